"""Make the adapter that ships in sta_adapter/demo/tiny_adapter: the demo's STA with LoRA beside it, for the tiny base.

`sta-adapter app` and `sta-adapter visualize` take it where no model is named. Minutes on two CPU cores; run from the
repository root:

    python scripts/make_tiny_adapter.py
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

from sta_adapter.demo.methods import DemoSettings, train_method
from sta_adapter.demo.model import save_adapter
from sta_adapter.demo.run import make_clips
from sta_adapter.demo.scores import measure

FOLDER = Path(__file__).parent.parent / "sta_adapter" / "demo" / "tiny_adapter"
README = """---
library_name: sta-adapter
license: apache-2.0
---

# The tiny base's adapter, for demos and tests

Stacked temporal attention in front of the spatial attention of each block, and LoRA on language model and vision
encoder: {parameters:,} parameters, trained on {clips:,} made clips of ten movements for {steps} steps of {batch}.
Made by `scripts/make_tiny_adapter.py` with the settings of `sta-adapter demo`.

Of {total} clips in looks that it was not trained on, it told right:

| frames | % |
| --- | --- |
| in order | {ordered:.1f} |
| shuffled | {shuffled:.1f} |

Chance: 10. It knows nothing but these movements.
"""


def main() -> None:
    """Train, measure, write the folder."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=FOLDER)
    options.add_argument("--steps", type=int, default=600)
    given = options.parse_args()
    logging.basicConfig(level=logging.INFO)
    settings = DemoSettings(steps=given.steps, points=1).from_tiny_base()
    with tempfile.TemporaryDirectory() as folder:
        data, test, curve = make_clips(Path(folder), settings, 0)
        trained = train_method("sta", settings, 0, data, curve, Path(folder, "run"))
        found = measure(trained, test)
    if trained.handle is None:
        raise SystemExit("training gave no STA")
    base: Any = trained.handle.model
    for config in base.peft_config.values():
        config.base_model_name_or_path = None  # a folder of this machine
    base.get_base_model().config._name_or_path = ""
    save_adapter(trained.handle, given.out)
    text = README.format(
        parameters=found["trainable_parameters"],
        clips=settings.train_clips,
        steps=settings.steps,
        batch=settings.batch_size,
        total=settings.test_clips,
        ordered=100 * found["ordered"]["overall"]["accuracy"],
        shuffled=100 * found["shuffled"]["overall"]["accuracy"],
    )
    (given.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
