"""Fixtures of all tests of the drop-in."""

import pytest
from diffusers import Kandinsky5Transformer3DModel
from small_crossdit import random_model

from model.weights import config_to_json


@pytest.fixture
def transformer() -> Kandinsky5Transformer3DModel:
    model = random_model()
    other = Kandinsky5Transformer3DModel(**config_to_json(model.config))
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()
