"""Every family's models run in quick forms, whole."""

import numpy as np
import pytest
import torch

import bitfold
from bitfold.runtime.load import load
from bitfold.runtime.quick_int4 import no_int4
from bitfold.runtime.quick_int8 import no_int8
from bitfold.runtime.quick_loading import load_quick
from models_zoo import CONFIGS, build

pytestmark = pytest.mark.skipif(
    no_int4(bitfold.Scheme.parse("w4a16g32"), (64, 64), torch.bfloat16) is not None
    or no_int8(bitfold.Scheme.parse("w8a8")) is not None,
    reason="no quick forms on this machine",
)


@pytest.mark.parametrize("scheme", ["w4a16g32", "w8a8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_family_runs_in_quick_forms(family, scheme, tmp_path):
    source = build(family, torch.bfloat16, tmp_path / "source")
    windows = np.random.default_rng(0).integers(4, 60, (4, 32))
    np.save(tmp_path / "calibration.npy", windows)
    bitfold.quantize(
        *(source, tmp_path / "out"),
        method="rtn",
        scheme=scheme,
        calibration=str(tmp_path / "calibration.npy"),
    )
    quick, layers = load_quick(tmp_path / "out", device="cpu")
    assert layers
    assert not [layer for layer in layers if layer.form is None]
    ids = torch.from_numpy(windows[:1])
    with torch.no_grad():
        found = quick(input_ids=ids).logits
        wanted = load(tmp_path / "out", device="cpu")(input_ids=ids).logits
        plain = load(tmp_path / "out", device="cpu", dtype="bfloat16")(input_ids=ids).logits
    assert (found - wanted).norm() <= (plain - wanted).norm()
