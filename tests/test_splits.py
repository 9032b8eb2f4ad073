"""Splits: shares and partitions for all inputs, the file of the original tool, what is refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.splits import (
    Row,
    Split,
    SplitError,
    by_flag,
    per_class,
    read_split,
    with_validation,
    write_split,
)

NAMES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")

sizes = st.lists(st.integers(2, 40), min_size=1, max_size=5)  # images of each class
percent = st.integers(1, 99)
seeds = st.integers(0, 2**32)
relaxed = settings(deadline=None)  # the machine may be busy


def names_of(count):
    return tuple(f"{k + 1:03d}.Class" for k in range(count))


def make_rows(counts):
    """Rows of classes with the given numbers of images; map names are ids from 1."""
    names = names_of(len(counts))
    pairs = [(k, j) for k, count in enumerate(counts) for j in range(count)]
    return [
        Row(f"{names[k]}/{j}.jpg", k, str(number)) for number, (k, j) in enumerate(pairs, start=1)
    ]


def carve(rows, share, seed):
    """Rows that stay for training, and those that are taken for validation."""
    split = with_validation(Split(tuple(rows), (), ()), share, seed)
    return list(split.train), list(split.val)


def of_class(rows, label):
    return [row for row in rows if row.label == label]


def in_order_of(part, rows):
    """Whether a part has its rows in the order they have in all rows."""
    chosen = set(part)
    return list(part) == [row for row in rows if row in chosen]


# -------------------------------------------------------------------------------------- per_class


@relaxed
@given(st.integers(2, 3000), percent)
def test_train_has_the_exact_floor_of_the_share(count, k):
    # In whole numbers: floor(n * k / 100), held between 1 and n - 1
    split = per_class(make_rows([count]), names_of(1), k / 100)
    assert len(split.train) == min(max(count * k // 100, 1), count - 1)
    assert len(split.test) == count - len(split.train)


@pytest.mark.parametrize(
    ("count", "share", "train"),
    [(60, 0.8, 48), (10, 0.7, 7), (50, 0.58, 29), (2, 0.01, 1), (2, 0.99, 1), (7, 1 - 1e-12, 6)],
)
def test_shares_that_floating_point_would_miss(count, share, train):
    assert len(per_class(make_rows([count]), names_of(1), share).train) == train


@relaxed
@given(sizes, percent, st.booleans(), seeds, st.randoms())
def test_per_class_is_a_partition_that_keeps_the_order(counts, k, shuffle, seed, random):
    rows = make_rows(counts)
    random.shuffle(rows)  # the classes may come mixed
    split = per_class(rows, names_of(len(counts)), k / 100, shuffle, seed)
    assert len(split.train) + len(split.test) == len(rows)
    assert {*split.train, *split.test} == set(rows)
    assert in_order_of(split.train, rows) and in_order_of(split.test, rows)
    assert split.val == () and split.label_list == names_of(len(counts))
    assert split == per_class(rows, names_of(len(counts)), k / 100, shuffle, seed)


@relaxed
@given(sizes, percent)
def test_without_shuffle_train_has_the_first_images_of_each_class(counts, k):
    rows = make_rows(counts)
    split = per_class(rows, names_of(len(counts)), k / 100)
    for label in range(len(counts)):
        assert of_class(split.train, label) + of_class(split.test, label) == of_class(rows, label)


@relaxed
@given(st.integers(2, 30), sizes, sizes, seeds, st.booleans())
def test_a_class_is_split_the_same_whatever_the_others_are(count, others, more, seed, shuffle):
    first, second = (
        per_class(make_rows([count, *rest]), names_of(1 + len(rest)), 0.6, shuffle, seed)
        for rest in (others, more)
    )
    paths = [{row.path for row in of_class(split.train, 0)} for split in (first, second)]
    assert paths[0] == paths[1]


def test_shuffle_depends_on_the_seed_and_on_the_class():
    rows = make_rows([40, 40])
    plain = per_class(rows, names_of(2), 0.5)
    one, two = (per_class(rows, names_of(2), 0.5, True, seed) for seed in (1, 2))
    assert plain.train != one.train and one.train != two.train
    chosen = [[row.path.split("/")[1] for row in of_class(one.train, k)] for k in range(2)]
    assert chosen[0] != chosen[1]


def test_a_data_set_of_the_size_of_cub_gives_the_numbers_of_the_original_tool():
    # 200 classes and 11,788 images as in CUB; the sizes of the classes are made up
    numbers = {60: 135, 59: 20, 58: 25, 55: 17, 41: 3}
    counts = [size for size, classes in numbers.items() for _ in range(classes)]
    assert len(counts) == 200 and sum(counts) == 11_788
    split = per_class(make_rows(counts), names_of(200), 0.8)
    assert (len(split.train), len(split.test)) == (9_414, 2_374)
    by_label = Counter(row.label for row in split.train)
    assert [by_label[k] for k in range(200)] == [int(count * 0.8) for count in counts]


# ----------------------------------------------------------------------------------------- by_flag


def test_by_flag_gives_the_flagged_rows_to_train():
    rows = make_rows([2, 3])
    split = by_flag(rows, names_of(2), [True, False, 0, 1, 1])
    assert split == Split((rows[0], rows[3], rows[4]), (rows[1], rows[2]), names_of(2))


# ------------------------------------------------------------------------------------------- carve


@relaxed
@given(st.lists(st.integers(1, 40), max_size=5), st.floats(0, 0.999), seeds, st.randoms())
def test_carve_takes_the_rounded_share_of_each_class_or_one_of_three(counts, share, seed, random):
    rows = make_rows(counts)
    random.shuffle(rows)
    train, val = carve(rows, share, seed)
    assert len(train) + len(val) == len(rows) and {*train, *val} == set(rows)
    assert in_order_of(train, rows) and in_order_of(val, rows)
    for label, count in enumerate(counts):
        least = int(share > 0 and count >= 3)
        assert len(of_class(val, label)) == min(max(round(share * count), least), count - 1)
    assert (train, val) == carve(rows, share, seed)


@relaxed
@given(sizes, st.floats(0.1, 0.9), seeds, st.data())
def test_carve_takes_the_same_images_whatever_other_classes_are_present(counts, share, seed, data):
    rows = make_rows(counts)
    kept = data.draw(st.sets(st.sampled_from(range(len(counts)))))
    _, val = carve(rows, share, seed)
    _, fewer = carve([row for row in rows if row.label in kept], share, seed)
    assert fewer == [row for row in val if row.label in kept]


@pytest.mark.parametrize("names", [("004.Groove_billed_Ani", "001.Auk"), ("wren", "auk")])
def test_a_class_is_known_by_its_folder_and_not_by_its_label(names):
    rows = [Row(f"{name}/{j}.jpg", k, "") for k, name in enumerate(names) for j in range(20)]
    alone = [Row(row.path, 0, "") for row in of_class(rows, 1)]
    val = [row.path for row in of_class(carve(rows, 0.3, 7)[1], 1)]
    assert val == [row.path for row in carve(alone, 0.3, 7)[1]] and len(val) == 6
    made = per_class(rows, names, 0.5, True, 7)
    single = per_class(alone, names[1:], 0.5, True, 7)
    assert [r.path for r in of_class(made.train, 1)] == [r.path for r in single.train]


def test_carve_depends_on_the_seed_and_takes_none_for_0():
    rows = make_rows([40, 40])
    assert carve(rows, 0.2, 1)[1] != carve(rows, 0.2, 2)[1]
    assert carve(rows, 0, 1) == (rows, [])


def test_with_validation_changes_train_and_val_only():
    split = per_class(make_rows([10, 20]), names_of(2), 0.5)
    found = with_validation(split, 0.2, seed=3)
    assert [*map(list, (found.train, found.val))] == [*carve(split.train, 0.2, 3)]
    assert len(found.val) == 1 + 2
    assert (found.test, found.label_list) == (split.test, split.label_list)


# -------------------------------------------------------------------------------------- the file


def original(**changes):
    """What the original tool writes: labels are numbers, map names text; 3 classes."""
    content = {
        "train": [[f"{name}/a.jpg", k, str(k + 1)] for k, name in enumerate(NAMES)],
        "test": [[f"{name}/b.jpg", k, str(k + 4)] for k, name in enumerate(NAMES)],
        "label_list": list(NAMES),
    }
    return {**content, **changes}


def store(folder, content):
    path = folder / "split.json"
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=4)
    return path


def test_a_file_of_the_original_tool_loads_and_is_written_back_the_same(tmp_path):
    path = store(tmp_path, original())
    split = read_split(path)
    assert split.train == tuple(Row(f"{name}/a.jpg", k, str(k + 1)) for k, name in enumerate(NAMES))
    assert split.test[2] == Row("003.Sooty_Albatross/b.jpg", 2, "6")
    assert (split.label_list, split.val) == (NAMES, ())
    before = path.read_bytes()
    write_split(split, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["split.json"]


# Folder names as people give them; "images" is the name that reading cuts off elsewhere
word = st.text(st.sampled_from("abzäÜß鳥 0189_-.'\""), min_size=1, max_size=8).filter(
    lambda text: set(text) != {"."}
)
class_names = st.lists(word | st.just("images"), min_size=1, max_size=4, unique=True)


@settings(max_examples=60, deadline=None)
@given(class_names, st.lists(st.integers(2, 9), min_size=4, max_size=4), st.data())
def test_write_and_read_give_the_same_split(tmp_path_factory, names, counts, data):
    folders = [data.draw(st.sampled_from(["", "images/", "more/images/"])) for _ in names]
    rows = [
        Row(f"{name}/{folder}{j}.jpg", k, f"{k}-{j}")
        for k, (name, folder) in enumerate(zip(names, folders, strict=True))
        for j in range(counts[k])
    ]
    split = with_validation(per_class(rows, names, 0.7), data.draw(st.sampled_from([0, 0.4])), 5)
    path = tmp_path_factory.mktemp("made") / "new" / "folder" / "split.json"
    write_split(split, path)
    assert read_split(path) == split
    assert ("val" in json.loads(path.read_text(encoding="utf-8"))) == bool(split.val)


# Names that Linux takes; "\udce9" stands for a byte that is no UTF-8
letters = st.text("aA:.\\ \"'\n\t\x7f\u00e9e\u0301\U0001f426\udce9", min_size=1, max_size=6)
tricky = st.sampled_from(
    ["images", "C:", "C:\\x", "12:30", "a..b", "a.jpg", "..", " ", "train", "~"]
)
on_linux = (letters | tricky).filter(lambda name: name not in (".", ".."))


@settings(max_examples=200)
@given(
    st.lists(on_linux, min_size=2, max_size=4, unique=True),
    st.lists(on_linux, min_size=2, max_size=4, unique=True),
    st.sampled_from(["", "train/", "images/"]),
)
def test_any_name_comes_back_from_a_file(tmp_path_factory, names, files, above):
    rows = [
        Row(f"{above}{name}/{file}.jpg", label, PurePosixPath(f"{file}.jpg").stem)
        for label, name in enumerate(names)
        for file in files
    ]
    split = per_class(rows, names, 0.5, shuffle=True)
    path = tmp_path_factory.mktemp("any") / "split.json"
    write_split(split, path)
    assert read_split(path) == split


@pytest.mark.parametrize("path", ["/x/a.jpg", "../a.jpg", "x/../../a.jpg", "", ".", ".."])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_exact_paths_stay_inside_too(tmp_path, path, encoding):
    text = json.dumps({**with_row(path), "exact": True})
    (tmp_path / "split.json").write_text(text, encoding=encoding)
    with pytest.raises(SplitError, match="row 4 of train has the image"):
        read_split(tmp_path / "split.json")


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    path = store(tmp_path, original())
    split = read_split(path)
    before = path.read_bytes()
    broken = replace(split, train=(Row("001.x/a.jpg", {0}, "1"),))  # no JSON for a set
    with pytest.raises(TypeError):
        write_split(broken, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "label_list",
    [
        {"0": NAMES[0], "1": NAMES[1], "2": NAMES[2]},
        {"2": NAMES[2], "0": NAMES[0], "1": NAMES[1]},
        {NAMES[1]: 1, NAMES[0]: 0, NAMES[2]: 2},
    ],
)
def test_label_list_may_be_a_dict_in_any_order(tmp_path, label_list):
    assert read_split(store(tmp_path, original(label_list=label_list))).label_list == NAMES


def test_class_names_may_be_numbers(tmp_path):
    path = store(tmp_path, original(label_list={"2": "0", "1": "1", "0": "2"}))
    assert read_split(path).label_list == ("2", "1", "0")
    path = store(tmp_path, original(label_list={"7": 2, "8": 1, "9": 0}))
    assert read_split(path).label_list == ("9", "8", "7")


def test_more_than_nine_numbered_names_are_in_the_order_of_numbers(tmp_path):
    names = names_of(12)
    numbered = {
        str(k): name for k, name in sorted(enumerate(names), key=lambda pair: pair[1][::-1])
    }
    path = store(tmp_path, original(label_list=numbered))
    assert read_split(path).label_list == names


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (["x/a.jpg", "1", 7], Row("x/a.jpg", 1, "7")),
        (["x/a.jpg", 1, "7.jpg"], Row("x/a.jpg", 1, "7")),
        (["x/a.jpg", 1, "a.b"], Row("x/a.jpg", 1, "a.b")),
        (["a.jpg", 0, 0], Row("a.jpg", 0, "0")),
        (["x/12:30 a..b.jpg", 0, "12:30 a..b"], Row("x/12:30 a..b.jpg", 0, "12:30 a..b")),
        (["./x//a..b.jpg", 0, 0], Row("x/a..b.jpg", 0, "0")),
        (["datasets/CUB_200_2011/images/001.x/a.jpg", 0, 1], Row("001.x/a.jpg", 0, "1")),
        (["images/001.x/a.jpg", 0, 1], Row("001.x/a.jpg", 0, "1")),
        (["/home/images/CUB/images//001.x/a.jpg", 0, 1], Row("001.x/a.jpg", 0, "1")),
        (["D:\\CUB\\images\\001.x\\a.jpg", 0, 1], Row("001.x/a.jpg", 0, "1")),
        (["001.x\\a.jpg", 0, 1], Row("001.x/a.jpg", 0, "1")),
        (["my_images/a.jpg", 0, 1], Row("my_images/a.jpg", 0, "1")),
        ([f"{NAMES[0]}/images/a.jpg", 0, 1], Row(f"{NAMES[0]}/images/a.jpg", 0, "1")),
    ],
)
def test_rows_made_elsewhere_are_read(tmp_path, row, expected):
    assert read_split(store(tmp_path, original(train=[row]))).train == (expected,)


def test_a_byte_order_mark_and_further_keys_do_no_harm(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(original(made_by="hand")), encoding="utf-8-sig")
    assert len(read_split(path).train) == 3


# ----------------------------------------------------------------------------------------- refused


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and "; " in text  # what is wrong; the remedy
    return text


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 80, float("nan"), float("inf")])
def test_a_share_for_training_is_between_0_and_1(share):
    with pytest.raises(SplitError, match=rf"^the share N .* is {share}; give .* 0 and 1\.$"):
        per_class(make_rows([4]), names_of(1), share)


@pytest.mark.parametrize("share", [1.0, -0.1, 10, float("nan")])
def test_a_validation_share_is_at_least_0_and_below_1(share):
    with pytest.raises(SplitError, match=rf"^the validation share is {share}; give 0 ") as error:
        carve(make_rows([4]), share, 0)
    one_sentence(error)


@pytest.mark.parametrize(
    ("rows", "label_list", "message"),
    [
        ([], names_of(1), "there are no images to split"),
        (make_rows([3, 1]), names_of(2), "class '002.Class' has 1 image.* add images"),
        (make_rows([3]), names_of(2), "class '002.Class' has 0 image.* leave the class out"),
        (make_rows([3, 3]), names_of(1), r"row 4 \(002.Class/0.jpg\) has the label 1 .* 0 to 0 is"),
        ([Row("x.jpg", -1, "1")], names_of(1), r"row 1 \(x.jpg\) has the label -1 where a whole"),
        (
            make_rows([3]) + make_rows([2]),
            names_of(1),
            "row 4 of the images is the image '001.Class/0.jpg', as is row 1 of the images; keep",
        ),
        (make_rows([3]), ("x", "y", "x"), "label_list has the name 'x' 2 times; give each class"),
    ],
)
def test_per_class_refuses(rows, label_list, message):
    with pytest.raises(SplitError, match=message) as error:
        per_class(rows, label_list, 0.5)
    assert "leak" not in one_sentence(error)


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (make_rows([3]), [1, 0], "there are 3 images but 2 train flags; give one flag"),
        (make_rows([3]), [0, 0, 0], "leave train without images"),
        (make_rows([3]), [1, 1, 1], "leave test without images"),
        ([], [], "leave train without images"),
        (make_rows([2]) * 2, [1, 1, 0, 0], "row 3 of the images is .* as is row 1"),
        (make_rows([1, 1]), [1, 0], r"row 2 \(002.Class/0.jpg\) has the label 1"),
    ],
)
def test_by_flag_refuses(rows, flags, message):
    with pytest.raises(SplitError, match=message) as error:
        by_flag(rows, names_of(1), flags)
    one_sentence(error)


def test_a_seed_below_0_is_refused():
    with pytest.raises(SplitError, match=r"^seed is -1; give a whole number"):
        per_class(make_rows([4]), names_of(1), 0.5, shuffle=True, seed=-1)
    with pytest.raises(SplitError, match=r"^seed is -2; give a whole number"):
        carve(make_rows([4]), 0.5, seed=-2)


def test_validation_is_not_carved_twice():
    split = with_validation(per_class(make_rows([20]), names_of(1), 0.5), 0.2, 0)
    with pytest.raises(SplitError, match="already names 2 validation images; use them"):
        with_validation(split, 0.2, 0)


def with_row(path="x/new.jpg", label=0, map_name="9", part="train"):
    """The original file with one more row, the fourth of the part."""
    content = original()
    return {**content, part: [*content[part], [path, label, map_name]]}


FIRST = f"{NAMES[0]}/a.jpg"  # row 1 of train


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # the path
        (with_row("/birds/a.jpg"), "row 4 of train has the image '/birds/a.jpg' where a path"),
        (with_row("../a.jpg"), r"has the image '\.\./a.jpg'"),
        (with_row("x/../../images/x/a.jpg"), "has the image 'x/"),
        (with_row("x\\..\\..\\a.jpg"), "has the image"),
        (with_row("C:\\birds\\a.jpg"), "has the image 'C:"),
        (with_row("C:a.jpg"), "has the image 'C:a.jpg'"),
        (with_row("images/C:/a.jpg"), "has the image 'images/C:/a.jpg'"),
        (with_row("\\\\server\\birds\\a.jpg"), "has the image"),
        (with_row(""), "has the image ''"),
        (with_row("."), "has the image '.'"),
        (with_row("datasets/images/"), "has the image 'datasets/images/'"),
        (with_row(5), "has the image 5 where"),
        # the map name
        (with_row(map_name="maps/9"), "row 4 of train has the map name 'maps/9' where a file"),
        (with_row(map_name="maps\\9", part="test"), "row 4 of test has the map name"),
        (with_row(map_name=".."), r"the map name '\.\.'"),
        (with_row(map_name="C:9"), "the map name 'C:9'"),
        (with_row(map_name=""), "the map name ''"),
        (with_row(map_name=".jpg"), "the map name '.jpg'"),
        (with_row(map_name=True), "the map name True"),
        (with_row(map_name=None), "the map name None"),
        # the label
        (with_row(label=3), "row 4 of train has the label 3 where a whole number from 0 to 2"),
        (with_row(label=-1), "the label -1 where"),
        (with_row(label="-1"), "the label '-1' where"),
        (with_row(label=1.5), "the label 1.5 where"),
        (with_row(label=1.0), "the label 1.0 where"),
        (with_row(label=True), "the label True where"),
        (with_row(label=None), "the label None where"),
        (with_row(label="²"), "the label '²' where"),
        (with_row(label="one"), "the label 'one' where"),
        (with_row(label="9" * 5000), "the label '9999"),
        (with_row(label=float("nan")), "the label nan where"),
        # the shape of a row and of a part
        (original(test=[["x/a.jpg", 0]]), r"row 1 of test is \['x/a.jpg', 0\] where \[path, label"),
        (original(test=[["x/a.jpg", 0, "1", 2]]), "row 1 of test is"),
        (original(test=["abc"]), "row 1 of test is 'abc' where"),
        (original(train={"0": "x"}), "train is {'0': 'x'} where a list of rows is expected"),
        (original(val=None), "val is None where a list of rows"),
        (original(train=[]), "train has no rows"),
        (original(test=[]), "test has no rows"),
        # the same image twice
        (with_row(FIRST), f"row 4 of train is the image '{FIRST}', as is row 1 of train; keep"),
        (with_row(FIRST, part="test"), "as is row 1 of train, a leak from train to test; keep"),
        (with_row(f"./images/{FIRST}", part="test"), "a leak from train to test"),
        (original(val=[[FIRST, 0, "1"]]), "row 1 of val .* a leak from train to val"),
        (
            original(val=[[f"{NAMES[1]}/b.jpg", 1, "1"]]),
            "row 2 of test is .* as is row 1 of val, a leak from val to test",
        ),
        # the keys and label_list
        *(
            ({k: v for k, v in original().items() if k != key}, f"the key '{key}' is missing")
            for key in ("train", "test", "label_list")
        ),
        ([], "the key 'train' is missing"),
        (None, "the key 'train' is missing"),
        (original(label_list=["a", "b", "a"]), "label_list has the name 'a' 2 times"),
        (original(label_list={"0": "a", "1": "a", "2": "b"}), "label_list has the name 'a' 2"),
        (original(label_list=[]), r"label_list is \[\] where a list of class names"),
        (original(label_list={}), "label_list is {} where a list of class names"),
        (original(label_list="abc"), "label_list is 'abc' where"),
        (original(label_list=["a", 2, "c"]), r"label_list is \['a', 2, 'c'\] where"),
        (original(label_list={"0": "a", "2": "b"}), "where the numbers 0 to 1, each once"),
        (original(label_list={"a": 0, "b": 0}), "where the numbers 0 to 1, each once"),
        (original(label_list={"a": "x"}), "where the numbers 0 to 0, each once"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence_with_file_place_value_and_remedy(
    tmp_path, content, message
):
    path = store(tmp_path, content)
    with pytest.raises(SplitError, match=message) as error:
        read_split(path)
    assert one_sentence(error).startswith(f"{path}: ") and len(one_sentence(error)) < 500


@pytest.mark.parametrize(
    "content", [b"", b'{"train": [[', b"\xff\xfe\x00", b"[" * 100_000, b"train,test\n"]
)
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "split.json"
    path.write_bytes(content)
    with pytest.raises(SplitError, match=r"split.json is no JSON or is damaged \(.*lib split"):
        read_split(path)


def test_a_missing_file_is_told_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.json is missing; make it with"):
        read_split(tmp_path / "no.json")
