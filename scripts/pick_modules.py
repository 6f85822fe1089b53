"""Takes a kernel and the few modules that a guest needs out of unpacked kernel packages.

    pick_modules.py ROOT OUT

ROOT is where the packages were unpacked. OUT gets ``vmlinuz``, ``version`` and ``modules/NN-NAME.ko``: uncompressed,
numbered in the order in which they must be loaded. Packages have no ``modules.dep`` (depmod makes it at the
installation), so the dependencies are read from the modules themselves.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

#: A guest cannot do without these: its disk, its network, its file system, the power button.
NEEDED: Final = ("virtio_pci", "virtio_blk", "virtio_net", "ext4", "button", "evdev")
#: Taken where the kernel has them; on some they are built in or do not exist.
WELCOME: Final = (
    "crc32c_generic",
    "crc32c_intel",
    "af_packet",
    "virtio_rng",
    "vmgenid",
    "virtio_console",
    "pvpanic_mmio",
)

_SUFFIXES: Final = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


class MissingError(Exception):
    """The packages lack something."""


def module_name(path: str) -> str:
    """``kernel/fs/ext4/ext4.ko.zst`` → ``ext4``: the kernel takes '-' and '_' in names for the same."""
    return path.rsplit("/", 1)[-1].split(".", 1)[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    """The module, uncompressed."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix in {".zst", ".gz"}:
        tool = "zstd" if path.suffix == ".zst" else "gzip"
        return subprocess.run([tool, "-dc", path], check=True, capture_output=True, timeout=60).stdout
    return path.read_bytes()


def dependencies(module: bytes) -> list[str]:
    """The modules that must be loaded before: ``depends`` and ``softdep: pre`` of its ``.modinfo``."""
    answer: list[str] = []
    for match in re.finditer(rb"(?:^|\0)depends=([\w,-]*)(?=\0)", module):
        answer += [name for name in match[1].decode().split(",") if name]
    for match in re.finditer(rb"(?:^|\0)softdep=pre: ?([\w -]*)(?=\0)", module):
        answer += match[1].decode().split()
    return [name.replace("-", "_") for name in answer]


class Picker:
    """Collects modules, each after those that it depends on."""

    def __init__(self, directory: Path) -> None:
        self.files = {
            module_name(str(path)): path
            for path in sorted(directory.rglob("*.ko*"))
            if path.name.endswith(_SUFFIXES) and path.is_file()
        }
        builtin = directory / "modules.builtin"
        self.builtin = {module_name(line) for line in builtin.read_text().split()} if builtin.exists() else set[str]()
        self.picked: dict[str, bytes] = {}

    def pick(self, name: str, *, needed: bool) -> None:
        """Takes the module *name* and all that it depends on.

        Raises:
            MissingError: it is needed, and neither there nor built in.
        """
        if name in self.picked or name in self.builtin:
            return
        path = self.files.get(name)
        if path is None:
            if needed:
                raise MissingError(f"the kernel has no module {name}")
            return
        module = read_module(path)
        for other in dependencies(module):
            # a soft dependency may be an alias such as "crc32c", which names no module
            self.pick(other, needed=False)
        self.picked[name] = module


def pick(root: Path, out: Path) -> None:
    """Does the whole work; *out* exists."""
    kernels = sorted(root.glob("boot/vmlinuz-*")) + sorted(root.glob("usr/lib/modules/*/vmlinuz"))
    if not kernels:
        raise MissingError("the packages hold no boot/vmlinuz-*")
    kernel = kernels[-1]
    version = kernel.name.removeprefix("vmlinuz-") if kernel.parent.name == "boot" else kernel.parent.name
    directories = [
        path for path in (root / "lib/modules" / version, root / "usr/lib/modules" / version) if path.is_dir()
    ]
    if not directories:
        raise MissingError(f"the packages hold no modules for the kernel {version}")
    picker = Picker(directories[0])
    for name in NEEDED:
        picker.pick(name, needed=True)
    for name in WELCOME:
        picker.pick(name, needed=False)
    shutil.copy2(kernel, out / "vmlinuz")
    (out / "vmlinuz").chmod(0o644)
    (out / "version").write_text(version + "\n")
    (out / "modules").mkdir()
    for i, (name, module) in enumerate(picker.picked.items()):
        (out / "modules" / f"{i:02}-{name}.ko").write_bytes(module)


def main() -> int:
    """Returns the exit code."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        pick(Path(sys.argv[1]), Path(sys.argv[2]))
    except (MissingError, OSError, lzma.LZMAError, subprocess.SubprocessError) as error:
        print(f"pick_modules: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
