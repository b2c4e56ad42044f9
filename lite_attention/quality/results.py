"""What a run found, and the JSON of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lite_attention.quality.calibrate import Calibration
from lite_attention.quality.generation import Agreement
from lite_attention.quality.loss import Loss
from lite_attention.quality.retrieval import Found


@dataclass
class Run:
    """The results so far, and what they are of.

    Attributes:
        environment: GPU, driver, versions, commit.
        model: its directory, architecture and shape.
        sketch_bits: of a channel in the sketch of a page, in all results.
        calibration: where one was asked for.
    """

    environment: dict[str, str]
    model: dict[str, str]
    sketch_bits: int = 12
    calibration: Calibration | None = None
    loss: list[Loss] = field(default_factory=list)
    retrieval: list[Found] = field(default_factory=list)
    generation: list[Agreement] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, str]:
        """What all results have in common, by name."""
        return self.model | self.environment | {"sketch_bits": str(self.sketch_bits)}

    def write(self, path: Path) -> None:
        data = asdict(self)
        for found, one in zip(data["loss"], self.loss, strict=True):
            found["read"]["bytes"] = one.read.bytes
        path.write_text(json.dumps(data, indent=1) + "\n")
