"""Sigmoid Attention ViT: correct where a Vision Transformer looks."""
