"""What other packages put into a model's layers stays in use: LoRA adapters of peft, 8-bit weights of torchao."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_crossdit import relative_difference
from small_kandinsky import leaves_no_trace_of, run

from k5kernels.cache import MagCache
from k5kernels.integrations.diffusers import accelerate

LAYERS = r".*self_attention\.(to_query|to_key|to_value|out_layer)"
# Of stock attention, which rounds q and k to bfloat16; where activations are quantized too, by steps of 1/127.
ROUNDED, QUANTIZED = 2e-3, 2e-2


@pytest.fixture
def adapted(transformer: Any) -> Any:
    from peft import LoraConfig

    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=LAYERS))
    return transformer


def test_a_lora_adapter_acts_and_can_be_switched_while_accelerated(adapted):
    plain = run(adapted)
    adapted.disable_adapters()
    without = run(adapted)
    assert relative_difference(plain, without) > 0.05
    with accelerate(adapted, thr=1.0) as report:
        assert relative_difference(run(adapted), without) < ROUNDED
        adapted.enable_adapters()
        assert relative_difference(run(adapted), plain) < ROUNDED
    assert report.engines == {"nabla": 4}


def test_an_adapter_put_in_while_accelerated_acts_and_nothing_of_us_is_left(transformer):
    from peft import LoraConfig

    plain = run(transformer)
    handle = accelerate(transformer, thr=1.0, cache=MagCache({"cond": [1.0] * 9}))
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=LAYERS))
    ours = run(transformer)
    handle.disable()
    assert relative_difference(ours, run(transformer)) < ROUNDED
    assert relative_difference(ours, plain) > 0.05
    with leaves_no_trace_of(transformer, run), accelerate(transformer, thr=0.5):
        run(transformer)


INT8 = """
import sys, torch
sys.path[:0] = sys.argv[1:]
import torchao.quantization
from diffusers import Kandinsky5Transformer3DModel
from small_crossdit import random_model, relative_difference
from small_kandinsky import run
from k5kernels.integrations.diffusers import accelerate
from model.weights import config_to_json
for kind in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"):
    made = random_model()
    model = Kandinsky5Transformer3DModel(**config_to_json(made.config)).eval()
    model.load_state_dict(made.state_dict())
    plain = run(model)
    torchao.quantization.quantize_(model, getattr(torchao.quantization, kind)())
    stock = run(model)
    with accelerate(model, thr=1.0) as report:
        ours = run(model)
    print("found", kind, relative_difference(stock, plain), relative_difference(ours, stock), report.engines["nabla"])
"""


# In a process of its own: diffusers asks for torchao when it is imported, and torchao takes seconds to import.
@pytest.mark.slow
def test_quantized_weights_are_multiplied_as_torchao_does():
    pytest.importorskip("torchao")
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", INT8, str(tests.parent), str(tests), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("found")]
    assert len(found) == 2
    for kind, moved, difference, calls in found:
        assert float(moved) > 5e-3
        assert float(difference) < (ROUNDED if kind == "Int8WeightOnlyConfig" else QUANTIZED)
        assert calls == "2"
