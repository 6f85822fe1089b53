#!/bin/sh
# Gets what must not be installed on the host into the cache: an OCI registry (its package starts a daemon), a
# kernel with its modules (its package writes into /boot), a static busybox. Needs no root. Packages come from the
# sources that the host's apt has; they are unpacked, and nothing of them is run but the programs themselves.
#
#   scripts/fetch-tools.sh [all | registry | interop | cosign]
#
# "registry" gets the registry alone, for the tests. "interop" gets other people's tools, for the tests: they are built with
# the host's Go, from modules from where that has them. "cosign" is a part of it: on Debian its packages of two later
# releases are unpacked, which takes seconds; elsewhere Go builds it, which takes minutes. What can't be had is told, and all
# is well.
#
# $OVMS_CACHE, by default .cache of the repository:
#   tools/docker-registry        the registry            -> docker-registry_VERSION/
#   tools/busybox                busybox, static         -> busybox-static_VERSION/
#   tools/kernel/                vmlinuz, version, modules/NN-NAME.ko in the order of loading, -> linux_VERSION/
#   tools/oras, crane            built by Go             -> NAME_VERSION/
#   tools/cosign, cosign-2       cosign 3 and 2          -> NAME_VERSION/
#   tools/virtiofsd              that of Debian 13, with its libraries, where the host has none -> virtiofsd_VERSION/bin/
#   tools/referrers-registry     a registry with the referrers API, of tests/support/ -> referrers-registry_CHECKSUM/
#   tools/.checked-*             newer than apt's lists: nothing to look up
# Every version has a directory of its own, which appears whole or not at all.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cache=${OVMS_CACHE:-$(dirname "$here")/.cache}
what=${1:-all}

say() { printf 'fetch-tools: %s\n' "$*" >&2; }
die() { printf 'fetch-tools: error: %s\n' "$*" >&2; exit 1; }

wanted= built= signing= serving=
case "$what" in
    all) wanted='docker-registry busybox kernel' ;;
    registry) wanted='docker-registry' ;;
    interop) built='oras crane referrers-registry' signing='cosign cosign-2' serving=virtiofsd ;;
    cosign) signing='cosign cosign-2' ;;
    *) die "usage: ${0##*/} [all | registry | interop | cosign]" ;;
esac

# the host's own will do, where it is not the one that QEMU brought
for path in /usr/libexec/virtiofsd /usr/lib/virtiofsd; do
    [ ! -x "$path" ] || serving=
done

mkdir -p "$cache/tools"
cache=$(cd "$cache" && pwd)
tools=$cache/tools
recipe=2 # to be raised when other parts of a kernel are taken, or taken in another way

# The versions of what Go builds. go-containerregistry's is in the go.mod of our registry, which is made of it.
server=$here/../tests/support/referrers-registry
go_package() {
    case "$1" in
        oras) echo oras.land/oras/cmd/oras@v1.3.6 ;;
        crane) sed -n 's|^.*\(github.com/google/go-containerregistry\) \(v[^ ]*\).*$|\1/cmd/crane@\2|p' "$server/go.mod" ;;
        cosign) echo github.com/sigstore/cosign/v3/cmd/cosign@v3.1.3 ;;
        cosign-2) echo github.com/sigstore/cosign/v2/cmd/cosign@v2.5.0 ;;
        referrers-registry) echo "$1@$(cat "$server/main.go" "$server/go.mod" "$server/go.sum" | sha256sum | head -c 12)" ;;
    esac
}

go_dir() {
    package=$(go_package "$1")
    echo "${1}_${package##*@}"
}

# The release of Debian that has this version of cosign.
debian_release() {
    case "$1" in
        cosign) echo sid ;;
        cosign-2) echo trixie ;;
    esac
}

# Everything there, and no newer package lists or sources? Then there is nothing to ask apt.
fresh() {
    for name in $built; do
        [ "$(readlink "$tools/$name")" = "$(go_dir "$name")/$name" ] && [ -x "$tools/$name" ] || return 1
    done
    # any version does: what a release has newer is not looked for
    for name in $signing; do
        [ -x "$tools/$name" ] && [ "$tools/.checked-cosign" -nt "$here/fetch-tools.sh" ] || return 1
    done
    [ -z "$serving" ] || [ "$tools/.checked-virtiofsd" -nt "$here/fetch-tools.sh" ] || return 1
    [ -n "$wanted" ] || return 0
    for name in $wanted; do
        [ -e "$tools/$name" ] || return 1
    done
    [ -e "$tools/.checked-$what" ] || return 1
    [ -z "$(find "$here/fetch-tools.sh" "$here/pick_modules.py" /var/lib/apt/lists /etc/apt \
        -newer "$tools/.checked-$what" -print 2>/dev/null | head -n 1)" ]
}

fresh && exit 0
# 1.21 is the first that says which Go a module needs instead of failing to compile it
have_go() {
    go_minor=$(go version 2>/dev/null | sed -n 's/^go version go1\.\([0-9]*\).*/\1/p')
    [ "${go_minor:-0}" -ge 21 ]
}

if [ -n "$built" ] && ! have_go; then
    say "no Go 1.21 or later here: going on without$(printf ' %s' $built); the tests that need them are skipped"
    built=
fi
for program in ${wanted:+apt-get dpkg-deb python3} flock; do
    command -v "$program" >/dev/null 2>&1 ||
        die "no $program here: this needs Debian 12 or Ubuntu 24.04, or later; run scripts/setup-system.sh first"
done

exec 9>"$tools/.lock"
if ! flock -n 9; then
    say "waiting for another run to end"
    flock -w 900 9 || die "another run has been going on for 15 minutes"
fi
fresh && exit 0

rm -rf "$tools"/.work-* # of a run that was killed
work=$(mktemp -d "$tools/.work-XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# root does not hand the download to another user, who could not write here
own_lists=
apt() {
    program=$1
    shift
    if [ -n "$own_lists" ]; then
        set -- -o Dir::State::Lists="$cache/apt/lists" -o Dir::Cache="$cache/apt/cache" "$@"
    fi
    LC_ALL=C "$program" -q -o APT::Sandbox::User=root -o Acquire::Retries=3 "$@" 2>>"$work/apt.log" </dev/null
}

# With no lists on the host, or lists of long ago, take some of our own: that needs no root.
use_own_lists() {
    [ -z "$own_lists" ] || return 1
    say "the host's package lists are missing or old: getting a copy of our own"
    own_lists=yes
    mkdir -p "$cache/apt/lists/partial" "$cache/apt/cache/archives/partial"
    if ! apt apt-get update >/dev/null; then
        tail -n 15 "$work/apt.log" >&2
        return 1
    fi
}

# the version that apt would install, or nothing
candidate() {
    apt apt-cache policy "$1" | sed -n 's/^  Candidate: //p' | grep -v '^(none)$' || true
}

# the kernel packages that a package depends on: those with a version in the name
kernel_parts() {
    apt apt-cache show --no-all-versions "$1" | sed -n 's/^\(Pre-\)\{0,1\}Depends: //p' | tr ',' '\n' |
        sed -n 's/^ *\(linux-\(image\|modules\|binary\)-[0-9][^ |:]*\).*/\1/p' | sort -u
}

# download PACKAGE...: the .deb files into $work/debs
download() {
    rm -rf "$work/debs"
    mkdir "$work/debs"
    (cd "$work/debs" && apt apt-get download "$@" >/dev/null)
}

# get PACKAGE...: unpacked into $work/root
get() {
    say "getting $*"
    if ! download "$@"; then
        if ! use_own_lists || ! download "$@"; then
            tail -n 15 "$work/apt.log" >&2
            return 1
        fi
    fi
    rm -rf "$work/root"
    for deb in "$work"/debs/*.deb; do
        dpkg-deb -x "$deb" "$work/root" || return 1
    done
}

# The functions from here on are called in conditions, where "set -e" does nothing: they check each step.

# publish DIRECTORY NAME FILE: $work/new becomes tools/DIRECTORY, and tools/NAME leads to FILE in it
publish() {
    rm -rf "${tools:?}/$1" && mv "$work/new" "$tools/$1" && point "$1" "$2" "$3"
}

point() {
    ln -s "$1$3" "$work/link" && mv -T "$work/link" "$tools/$2"
}

# fetch_file NAME PACKAGE PATH: one program of one package
fetch_file() {
    version=$(candidate "$2")
    if [ -z "$version" ]; then
        use_own_lists || return 1
        version=$(candidate "$2")
    fi
    if [ -z "$version" ]; then
        say "no package $2 in the host's apt sources (on Ubuntu it is in 'universe')"
        return 1
    fi
    dir=${2}_$(printf %s "$version" | tr ':/' '__')
    if [ -x "$tools/$dir/$1" ]; then
        point "$dir" "$1" "/$1"
        return
    fi
    get "$2" || return 1
    mkdir "$work/new" || return 1
    for path in "$work/root/usr$3" "$work/root$3"; do
        if [ -f "$path" ]; then
            mv "$path" "$work/new/$1" && chmod 0755 "$work/new/$1" && publish "$dir" "$1" "/$1"
            return
        fi
    done
    say "the package $2 has no $3"
    return 1
}

# fetch_go NAME: one program, built by Go
fetch_go() {
    dir=$(go_dir "$1")
    if [ -x "$tools/$dir/$1" ]; then
        point "$dir" "$1" "/$1"
        return
    fi
    say "building $1 ${dir#*_} with Go"
    began=$(date +%s)
    rm -rf "$work/new"
    mkdir "$work/new" || return 1
    if build_go "$1" >"$work/go.log" 2>&1 && [ -x "$work/new/$1" ]; then
        say "$1 took $(($(date +%s) - began)) s"
        publish "$dir" "$1" "/$1"
        return
    fi
    grep -v '^go: downloading ' "$work/go.log" | tail -n 5 >&2
    return 1
}

build_go() (
    unset GOOS GOARCH # GOBIN is not for other machines' programs
    export CGO_ENABLED=0 GOBIN="$work/new"
    package=$(go_package "$1")
    if [ "$1" = referrers-registry ]; then
        cd "$server" || exit 1
        package=.
    fi
    timeout 900 go install -trimpath -ldflags='-s -w' "$package" || exit 1
    [ -e "$GOBIN/$1" ] || mv "$GOBIN"/* "$GOBIN/$1"
)

# debian_source RELEASE: apt's description of where that release is, in the mirror that the host takes its own from
debian_source() (
    # shellcheck source=/dev/null
    ID= VERSION_CODENAME=
    . /etc/os-release 2>/dev/null
    [ "$ID" = debian ] && [ -n "$VERSION_CODENAME" ] || exit 1
    uri=$(apt apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Identifier: Packages' |
        sed -n "s/^$VERSION_CODENAME //p" | head -n 1)
    [ -n "$uri" ] || exit 1
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$1"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ ! -e "$keyring" ] || printf 'Signed-By: %s\n' "$keyring"
)

# of_debian RELEASE PACKAGE...: unpacked into $work/root, of a release that is not the host's. Nothing is installed, and apt learns
# nothing of it.
of_debian() {
    release=$1
    shift
    rm -rf "$work/apt" "$work/debs" "$work/root" "$work/new"
    mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial" "$work/debs" "$work/new" || return 1
    debian_source "$release" >"$work/apt/its.sources" || return 1
    say "getting $1 of Debian $release"
    their_apt() {
        apt apt-get -o Dir::Etc::SourceList="$work/apt/its.sources" -o Dir::Etc::SourceParts=/dev/null \
            -o Dir::State::Lists="$work/apt/lists" -o Dir::Cache="$work/apt/cache" -o Acquire::Languages=none \
            -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
            -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false "$@" >/dev/null
    }
    their_apt update && (cd "$work/debs" && their_apt download "$@") || return 1
    for deb in "$work"/debs/*.deb; do
        dpkg-deb -x "$deb" "$work/root" || return 1
    done
    version=$(dpkg-deb -f "$work/debs/$1"_*.deb Version | tr ':/' '__')
}

# A package's program is all that is taken, and its libc is the host's or an older one.
cosign_of_debian() {
    of_debian "$(debian_release "$1")" cosign || return 1
    mv "$work/root/usr/bin/cosign" "$work/new/$1" && "$work/new/$1" version >/dev/null 2>&1 || return 1
    publish "${1}_$version" "$1" "/$1"
}

# Its libc is newer than that of Debian 12, so the libraries and the loader that it needs come along.
virtiofsd_of_debian() {
    [ "$(uname -m)" = x86_64 ] || return 1
    of_debian trixie virtiofsd libc6 libgcc-s1 libcap-ng0 libseccomp2 || return 1
    dir=virtiofsd_$version
    mv "$work/root" "$work/theirs" && mv "$work/new" "$work/made" && get patchelf && mv "$work/made" "$work/new" || return 1
    mkdir "$work/new/bin" "$work/new/lib" && mv "$work/theirs/usr/libexec/virtiofsd" "$work/new/bin" || return 1
    for name in ld-linux-x86-64.so.2 libc.so.6 libm.so.6 libgcc_s.so.1 libcap-ng.so.0 libseccomp.so.2; do
        cp -L "$work/theirs/usr/lib/x86_64-linux-gnu/$name" "$work/new/lib" || return 1
    done
    "$work/root/usr/bin/patchelf" --set-interpreter "$tools/$dir/lib/ld-linux-x86-64.so.2" \
        --force-rpath --set-rpath '$ORIGIN/../lib' "$work/new/bin/virtiofsd" || return 1
    publish "$dir" virtiofsd /bin/virtiofsd && "$tools/virtiofsd" --version >/dev/null 2>&1
}

find_kernel() {
    for meta in linux-image-cloud-amd64 linux-image-virtual linux-image-kvm linux-image-generic linux-image-amd64; do
        parts=$(kernel_parts "$meta" || true)
        [ -z "$parts" ] || return 0
    done
    return 1
}

fetch_kernel() {
    find_kernel || { use_own_lists && find_kernel; } || {
        say "no kernel package in the host's apt sources"
        return 1
    }
    # on Ubuntu the modules are in a package of their own, which the image depends on
    for part in $parts; do
        parts="$parts $(kernel_parts "$part" | grep -vxF "$parts" | grep -v '^linux-image-' | tr '\n' ' ')"
    done
    # shellcheck disable=SC2086 # a list of packages
    set -- $parts
    dir=linux_${1#linux-*-}_$(candidate "$1" | tr ':/' '__')_$recipe
    if [ ! -e "$tools/$dir/vmlinuz" ]; then
        get "$@" && mkdir "$work/new" && python3 "$here/pick_modules.py" "$work/root" "$work/new" &&
            publish "$dir" kernel ''
    else
        point "$dir" kernel ''
    fi
}

for name in $built; do
    fetch_go "$name" || {
        [ ! -e "$tools/$name" ] || { say "could not build a newer $name: going on with the one in the cache"; continue; }
        say "could not build $name: going on without; the tests that need it are skipped"
    }
done
for name in $signing; do
    if cosign_of_debian "$name"; then
        continue
    fi
    if have_go && fetch_go "$name"; then
        continue
    fi
    [ -x "$tools/$name" ] || say "could not get $name, of Debian or by Go: going on without; the tests that need it are skipped"
done
[ -z "$signing" ] || touch "$tools/.checked-cosign"
if [ -n "$serving" ]; then
    virtiofsd_of_debian || say "could not get virtiofsd of Debian: going on without; the tests that need it are skipped"
    touch "$tools/.checked-virtiofsd"
fi
[ -n "$wanted" ] || exit 0

failed=
for name in $wanted; do
    case "$name" in
        docker-registry) fetch_file docker-registry docker-registry /bin/docker-registry || failed=yes ;;
        busybox) fetch_file busybox busybox-static /bin/busybox || failed=yes ;;
        kernel) fetch_kernel || failed=yes ;;
    esac
    if [ -n "$failed" ]; then
        [ -e "$tools/$name" ] || die "could not get $name"
        say "could not look for a newer $name: going on with the one in the cache"
        failed=
        stale=yes
    fi
done
[ -n "${stale-}" ] || touch "$tools/.checked-$what"
