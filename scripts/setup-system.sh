#!/bin/sh
# Installs the Debian packages that ovms needs and that are missing; says each thing that it does.
#
#   scripts/setup-system.sh           to use ovms and to run its tests
#   scripts/setup-system.sh --demo    the same and what 'make demo' needs to make its guest
#
# For Debian 12 and Ubuntu 24.04 or later. Nothing missing: nothing done, in a blink.
set -eu

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

demo=no
case "${1-}" in
    '') ;;
    --demo) demo=yes ;;
    *) die "usage: ${0##*/} [--demo]" ;;
esac

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
missing=

# need COMMAND PACKAGE: the package is wanted when there is no such command
need() {
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}

need qemu-system-x86_64 qemu-system-x86 # SeaBIOS comes with it
need passt passt # the network of VMs
# where the release has it; a directory of its own, on nobody's PATH
[ -e /usr/libexec/virtiofsd ] || ! apt-cache show virtiofsd >/dev/null 2>&1 || missing="$missing virtiofsd"
need qemu-img qemu-utils
need ip iproute2 # tests, and redirects of networks
need ld binutils # the tests assemble a guest
need skopeo skopeo
need openssl openssl # the tests make certificates
need flock util-linux
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing="$missing ca-certificates"
if ! command -v python3 >/dev/null 2>&1; then
    missing="$missing python3 python3-venv"
elif ! python3 -Sc 'import ensurepip, venv' >/dev/null 2>&1; then
    missing="$missing python3-venv"
fi
if [ "$demo" = yes ]; then
    need mmdebstrap mmdebstrap
    need mke2fs e2fsprogs
    need debugfs e2fsprogs
    need xz xz-utils
    need zstd zstd
    # a file system is made without root in a user namespace
    [ "$(id -u)" = 0 ] || need newuidmap uidmap
fi

check_python() {
    python3 -Sc 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "python3 is $(python3 -V 2>&1); ovms needs Python 3.11 or later (Debian 12, Ubuntu 24.04 or later)"
}

if [ -z "$missing" ]; then
    check_python
    exit 0
fi

say "missing:$missing"
command -v apt-get >/dev/null 2>&1 ||
    die "no apt-get here: install the above by hand (ovms is set up by itself on Debian 12 and Ubuntu 24.04 or later)"
sudo=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null 2>&1 || die "not root, and there is no sudo: run as root: apt-get install$missing"
    sudo=sudo
    say "asking for root with sudo, to install these packages and nothing else"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

apt() {
    $sudo env DEBIAN_FRONTEND=noninteractive LC_ALL=C apt-get -q -y -o DPkg::Lock::Timeout=300 \
        -o Acquire::Retries=3 "$@" >"$log" 2>&1 </dev/null
}

apt_failed() {
    tail -n 25 "$log" >&2
    die "$*"
}

# apt waits for dpkg's lock when told to, but not for the lock of its lists
update() {
    say "apt-get update"
    tries=0
    until apt update; do
        tries=$((tries + 1))
        if [ "$tries" -ge 30 ] || ! grep -q 'Could not get lock' "$log"; then
            apt_failed "'apt-get update' failed: is there a network, and are the sources in /etc/apt right?"
        fi
        sleep 2
    done
}

# One set-up at a time: the lock is on the directory itself, so that it leaves no file and needs no right to write.
exec 9</var/lib/dpkg
if ! flock -n 9; then
    say "waiting for another set-up to end"
    flock -w 900 9 || die "another set-up has been running for 15 minutes"
    rm -f "$log"
    exec sh "$0" "$@" # it may have left nothing to do
fi

install() {
    # shellcheck disable=SC2086 # a list of packages
    apt install --no-install-recommends $missing
}

lists=$(find /var/lib/apt/lists -maxdepth 1 -name '*_Packages*' -print 2>/dev/null | head -n 1)
[ -n "$lists" ] || update
say "apt-get install$missing"
if ! install; then
    # the lists may name packages that the mirror has replaced since
    failed="'apt-get install' failed: is there a network, and has the disk room?"
    [ -n "$lists" ] || apt_failed "$failed"
    update
    say "apt-get install$missing (again)"
    install || apt_failed "$failed"
fi
check_python
say "done"
