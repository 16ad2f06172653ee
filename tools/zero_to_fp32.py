"""Write the whole weights of a ZeRO checkpoint, of DeepSpeed's own (stage 1, 2 or 3) or of this library's engine.

python tools/zero_to_fp32.py runs/checkpoints runs/weights --safe-serialization
python tools/zero_to_fp32.py runs/checkpoints runs/weights --tag global_step100 --dtype bf16 --max-shard-size 2GB
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_ds.data.cli import run
from megatron_ds.integrations.deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict


@dataclass(frozen=True)
class Convert:
    checkpoint_dir: tyro.conf.Positional[Path]
    """The directory that save_checkpoint was given."""
    output_dir: tyro.conf.Positional[Path]
    """Folder for pytorch_model.bin or model.safetensors."""
    dtype: str = "fp32"
    """Of the floating-point tensors: fp32, fp16 or bf16."""
    max_shard_size: str = "5GB"
    """Largest size of a file; several have an index beside them."""
    safe_serialization: bool = False
    """Write safetensors instead of a pickle."""
    tag: Annotated[str | None, tyro.conf.arg(aliases=["-t"])] = None
    """Checkpoint by name. Default: the one that the file `latest` names."""
    exclude_frozen_parameters: bool = False
    """Leave out parameters that were not trained."""


def main(options: Convert) -> None:
    convert_zero_checkpoint_to_state_dict(**vars(options))
    print(f"wrote {options.output_dir}")


if __name__ == "__main__":
    run(main, Convert, __doc__)
