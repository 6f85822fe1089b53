#!/bin/sh
# Builds what of ovms is no Python: src/ovms/vmm/watch/watch, from watch.c. The result is part of the repository, so that
# nobody needs a compiler to use ovms; a test tells when it is older than its source.
set -eu
cd "$(dirname "$0")/../src/ovms/vmm/watch"
digest=$(sha256sum watch.c | cut -d ' ' -f 1)
# no C library, nothing of the host: the same compiler gives the same bytes anywhere
${CC:-gcc} -std=gnu11 -Wall -Wextra -Werror -Os -ffreestanding -fno-tree-loop-distribute-patterns -fno-stack-protector \
    -fno-asynchronous-unwind-tables -fno-ident -fno-pic -no-pie -static -nostdlib -mno-sse \
    -Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,norelro -Wl,-z,noseparate-code -s \
    "-DSOURCE_DIGEST=\"$digest\"" -o "${1:-watch}" watch.c
