"""Images without a daemon and without a registry: buildah with chroot isolation, on a base that debootstrap makes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SUITE = "bookworm"  # its Python is 3.11
CERTIFICATES = "/etc/pip-certificates.pem"  # in the build, where pip's configuration names some
_PIP_OPTIONS = ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "default-timeout")


@dataclass(frozen=True)
class Volume:
    """A path of this machine that a container sees, and can't change."""

    source: str
    target: str

    def option(self) -> str:
        return f"--volume={self.source}:{self.target}:ro"


class Buildah:
    """buildah with all of its storage below one directory."""

    def __init__(self, storage: Path) -> None:
        self._storage = storage
        (storage / "tmp").mkdir(parents=True)
        self._env = {**os.environ, "TMPDIR": str(storage / "tmp"), "BUILDAH_ISOLATION": "chroot"}
        self._driver = "overlay"
        if subprocess.run(self.command("info"), capture_output=True, env=self._env).returncode:
            self._driver = "vfs"  # copies every layer whole, but works in a container too

    def command(self, *arguments: str) -> list[str]:
        places = (f"--root={self._storage / 'root'}", f"--runroot={self._storage / 'run'}")
        return ["buildah", *places, f"--storage-driver={self._driver}", *arguments]

    def __call__(self, *arguments: str) -> str:
        """Runs buildah and returns what it prints; where it fails, raises AssertionError with the end of its output."""
        done = subprocess.run(
            self.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self._env
        )
        tail = "\n".join(done.stdout.splitlines()[-60:])
        assert done.returncode == 0, f"buildah {' '.join(arguments)} ended with status {done.returncode}:\n{tail}"
        return done.stdout

    def configuration(self, image: str) -> dict[str, Any]:
        """What the image says of how to run it: Entrypoint, User, Healthcheck, ..."""
        return json.loads(self("inspect", "--type=image", image))["Docker"]["config"]

    def debian(self, name: str) -> None:
        """Makes a minimal Debian and commits it as the image `name`."""
        folder = self._storage / "debian"
        subprocess.run(["debootstrap", "--variant=minbase", SUITE, folder], check=True, stdout=subprocess.DEVNULL)
        container = self("from", "scratch").strip()
        self("copy", "--quiet", container, str(folder), "/")
        self("commit", "--quiet", container, name)
        self("rm", container)
        subprocess.run(["rm", "-rf", folder], check=True)


def pip_configuration(folder: Path) -> tuple[Path, list[Volume]]:
    """This machine's pip configuration, variables included, as a file for a build, and the volumes that it names."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    options, volumes = {}, []
    # Lines section.option='value'. The section :env:, which wins, comes first, so the lines are read backwards.
    for line in reversed(listed.stdout.splitlines()):
        key, _, value = line.partition("=")
        options[key.rpartition(".")[2]] = ast.literal_eval(value)
    options = {option: value for option, value in options.items() if option in _PIP_OPTIONS}
    if "cert" in options:
        volumes.append(Volume(options["cert"], CERTIFICATES))
        options["cert"] = CERTIFICATES
    for option in ("extra-index-url", "find-links", "index-url"):
        for url in map(urlsplit, options.get(option, "").split()):
            if url.scheme in ("", "file"):
                # The pages of an index on the disk link to files beside it.
                place = url.path if option == "find-links" else str(Path(url.path).parent)
                volumes.append(Volume(place, place))
    path = folder / "pip.conf"
    path.write_text("\n".join(["[global]", *(f"{option} = {value}" for option, value in options.items()), ""]))
    return path, [volume for volume in dict.fromkeys(volumes) if Path(volume.source).exists()]
