#!/bin/sh
# Runs a command in a fresh system of another release of Debian, over a clone of what is committed here: what a host has
# installed, and the versions of it, hide what the project lacks.
#
#   scripts/in-release.sh RELEASE [COMMAND]     scripts/in-release.sh trixie 'make test'
#
# Needs root, mmdebstrap and git. The system stands in $OVMS_CACHE/releases/RELEASE (by default .cache) and is kept, with what
# the command installed, for the next run; remove it for a fresh one. It shares the kernel, the network and /sys with the host.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
say() { printf 'in-release: %s\n' "$*" >&2; }
die() { printf 'in-release: error: %s\n' "$*" >&2; exit 1; }

[ $# -ge 1 ] && [ $# -le 2 ] || die "usage: ${0##*/} RELEASE [COMMAND]"
release=$1
command=${2:-make test}
case "$release" in *[!a-z0-9-]* | '') die "$release is no name of a release" ;; esac
[ "$(id -u)" = 0 ] || die "needs root"
for program in mmdebstrap git unshare pivot_root; do
    command -v "$program" >/dev/null 2>&1 || die "no $program here: apt-get install mmdebstrap git util-linux"
done

root=${OVMS_CACHE:-$here/.cache}/releases/$release
if [ ! -e "$root/.made" ]; then
    say "making a system of $release in $root"
    rm -rf "$root"
    mkdir -p "$root"
    mmdebstrap --quiet --variant=minbase --mode=root --include=make,git,ca-certificates "$release" "$root"
    touch "$root/.made"
fi
# as the host reaches the network
for file in /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
    [ ! -e "$file" ] || cp -L "$file" "$root$file"
done
if [ ! -e "$root/srv/ovms/.git" ]; then
    git clone -q --no-hardlinks "$here" "$root/srv/ovms"
else
    git -C "$root/srv/ovms" fetch -q "$here" HEAD
    git -C "$root/srv/ovms" checkout -q --detach FETCH_HEAD
fi
say "$(git -C "$root/srv/ovms" log -1 --format='%h %s')"

# pivot_root, not chroot: in a chroot nobody may make a user namespace, and VMs live in some
# shellcheck disable=SC2016
exec unshare --mount --propagation private sh -eu -c '
    mount --bind "$1" "$1"
    for name in proc sys dev; do mount --rbind "/$name" "$1/$name"; done
    mount -t tmpfs tmp "$1/tmp"
    mount -t tmpfs run "$1/run"
    mkdir -p "$1/.host"
    cd "$1"
    pivot_root . .host
    umount -l /.host
    cd /srv/ovms
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
        PIP_CERT=/etc/ssl/certs/ca-certificates.crt sh -c "$2"
' in-release "$root" "$command"
