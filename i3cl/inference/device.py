"""On which device a network runs and with which precision: the only place that decides either."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

from i3cl.errors import UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16"]


def choose_device(gpu: bool | Literal["auto"] = "auto") -> str:
    """'cuda' or 'cpu', for a network in this process, by the setting cluster.gpu.

    With `false` a GPU that is visible is not even asked for. UserError for `true` without a GPU.
    """
    if gpu is False:
        return "cpu"
    import torch

    found = torch.cuda.is_available()
    if gpu is True and not found:
        raise UserError("cluster.gpu: true, but this machine has no GPU that torch can use; set cluster.gpu=auto")
    return "cuda" if found else "cpu"


def half_precision(precision: Precision, device: str | torch.device, training: bool = False) -> bool:
    """Whether the setting train.precision means bfloat16 on this device.

    When it is asked for by name. With auto on a GPU that computes in it; and on a CPU in training, where the CPU has instructions
    for it: 1.5 times as many images a second. Without them bfloat16 is slower than float32. Predictions on a CPU stay in float32
    with auto, so that they are the same on every machine.
    """
    if precision != "auto":
        return precision == "bfloat16"
    return gpu_has_bfloat16(device) if str(device).startswith("cuda") else training and cpu_has_bfloat16()


def gpu_has_bfloat16(device: str | torch.device) -> bool:
    """Whether this GPU computes in bfloat16 itself; those before Ampere, such as the T4, imitate it slowly."""
    import torch

    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def full_float32(precision: Precision) -> None:
    """Switch TF32 off in this process when the precision is float32: a GPU would keep 10 bits of mantissa in convolutions."""
    if precision == "float32":
        import torch

        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU multiplies matrices in bfloat16 (AVX512-BF16 or AMX)."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(precision: Precision, device: str | torch.device, training: bool = False) -> AbstractContextManager[object]:
    """The context in which a network runs: bfloat16 where `half_precision` says so, otherwise nothing."""
    if not half_precision(precision, device, training):
        return nullcontext()
    import torch

    return torch.autocast(str(device).partition(":")[0], torch.bfloat16)
