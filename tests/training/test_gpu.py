"""What only a CUDA machine can show: `make test-gpu`. On other machines these are skipped."""

import pytest
import torch

from i3cl.config import with_overrides
from i3cl.model.network import I3CL
from i3cl.training.loop import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch sees none here"),
]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_on_a_gpu_keep_the_weights_finite(tiny_settings, tmp_path, precision):
    changes = {"train.precision": precision, "train.steps": 4, "train.checkpoint_every": 4}
    settings = with_overrides(tiny_settings, changes, "test")
    model = I3CL(settings.model).cuda()
    trainer = Trainer(settings, model, torch.device("cuda"), 0, 1, str(tmp_path / "run"))
    trainer.run(lambda metrics, step: None)
    assert trainer.step == 4
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_losses_on_a_gpu_are_those_on_a_cpu(tiny_settings, tmp_path):
    from i3cl.data.loading.transforms import to_target

    settings = with_overrides(tiny_settings, {"model.inter_dropout": 0.0, "train.precision": "float32"}, "test")
    torch.manual_seed(0)
    model = I3CL(settings.model).train()
    trainer = Trainer(settings, model, torch.device("cpu"), 0, 1, str(tmp_path / "run"))
    pairs = [to_target(sample) for sample in next(trainer._batches())]
    results = []
    for device in ("cpu", "cuda"):
        model.to(device)
        # The same candidates on both devices: the two generators draw differently.
        model.proposals.choose = model.heads.choose = lambda candidates, count: candidates[:count]
        targets = [
            {k: [m.to(device) for m in v] if isinstance(v, list) else v.to(device) for k, v in target.items()}
            for _, target in pairs
        ]
        results.append({k: float(v) for k, v in model([image.to(device) for image, _ in pairs], targets).items()})
    assert results[1] == pytest.approx(results[0], rel=1e-2)
