#!/usr/bin/env bash
# Runs the tests in a Debian 13 of their own, whose Python is 3.13. By hand, as root, on any Linux
# with debootstrap; 1 GB, and 6 GB for .venv:
#
#     tools/debian13.sh FOLDER                                  all but the browser and the notebooks
#     tools/debian13.sh FOLDER .ci/run                          everything, and Chromium for it
#     tools/debian13.sh FOLDER .venv/bin/python -m pytest tests/test_losses.py
#
# FOLDER is made on the first call and used again afterwards. The last commit of this checkout is
# laid into src in root's home there, and the command runs in it.
set -euo pipefail

TESTS='make .venv/installed && OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests --ignore tests/browser'
ME=$(realpath "${BASH_SOURCE[0]}")

refuse() {
    echo "$1" >&2
    exit 2
}

is_debian13() {
    grep -qs '^13' "$folder/etc/debian_version"
}

if [ "${1-}" != --inside ]; then
    [ $# -gt 0 ] || refuse "usage: tools/debian13.sh FOLDER [COMMAND...]"
    folder=$(realpath -m "$1")
    [ "$folder" != / ] || refuse "$folder is this machine itself; name an empty or a new folder."
    if ! is_debian13 && [ -n "$(ls -A "$folder" 2>/dev/null)" ]; then
        refuse "$folder holds something else; name an empty or a new folder."
    fi
    [ "$(id -u)" = 0 ] || refuse "Only root can make and enter $folder."
    # What is mounted and started in there is seen in there only, and is gone with this process
    # however it ends: a trap would not run after kill -9. unshare itself is deaf to kill.
    setpriv --pdeathsig KILL \
        unshare --mount --pid --fork --kill-child --mount-proc "$ME" --inside "$folder" "${@:2}"
    exit
fi
folder=$2
shift 2
[ $# -gt 0 ] || set -- bash -c "$TESTS"

if ! is_debian13; then
    # Under another name until it is whole. The mirror is this machine's own, or debootstrap's.
    rm -rf --one-file-system "$folder.part"
    mirror=$(grep -rhsv '^ *#' /etc/apt/sources.list /etc/apt/sources.list.d |
        grep -oEm1 '[a-z]+://[^ ]+/debian/?( |$)' || true)
    debootstrap --variant=minbase --include=ca-certificates,git,make,python3-venv \
        trixie "$folder.part" ${mirror:+"${mirror% }"}
    [ ! -e "$folder" ] || rmdir "$folder"
    mv "$folder.part" "$folder"
fi

mount --rbind /dev "$folder/dev"
mount -t tmpfs tmpfs "$folder/dev/shm" # loaders that work beside a training need more than 64 MB
mount -t proc proc "$folder/proc"
cp -L /etc/resolv.conf "$folder/etc/resolv.conf"
# A name without an address, and processes that train together would wait for each other for ever.
{
    cat /etc/hosts
    echo "127.0.0.1 $(hostname)"
} >"$folder/etc/hosts"
if compgen -G '/usr/local/share/ca-certificates/*' >/dev/null; then # a company's own
    cp -rL /usr/local/share/ca-certificates "$folder/usr/local/share/"
    chroot "$folder" update-ca-certificates >/dev/null
fi

here=$(git -C "$(dirname "$ME")" rev-parse --show-toplevel)
home=$folder/root
source=$home/src
[ -e "$source" ] || git init -q "$source"
git -C "$source" fetch -q "$here" HEAD
git -C "$source" checkout -q --force --detach FETCH_HEAD
git -C "$source" log -1 --format='%h %s'

# Nothing of this machine but how to reach the network. The shell is not replaced by the command:
# it is process 1 in here, and buries what others leave.
mapfile -t network < <(env | grep -iE '^(PIP_[A-Z_]+|[A-Z]+_PROXY)=' || true)
chroot "$folder" env -i HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" "${network[@]}" \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    bash -c 'cd ~/src && exec "$@"' bash "$@"
