"""The profile of a step counts the work of its parts, and writes a table, a file and a picture."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner, Result

from bench.profile.__main__ import HEADER, app, limit, rows
from bench.profile.parts import Part, Parts, Roof
from k5kernels import TokenLayout, block_sparse_attention, nabla_mask
from k5kernels.attention import attention
from k5kernels.terminal import table
from model.linear import ROWS_TO_REORDER, Linear

CPU = torch.device("cpu")
LAYOUT = TokenLayout(((2, 16, 16),))


def found(function) -> dict[str, Part]:
    with Parts(CPU, LAYOUT) as parts:
        function()
    return {part.name: part for part in parts.found.values()}


def test_operations_and_bytes_of_a_product():
    left, right = torch.randn(30, 20), torch.randn(20, 10)
    part = found(lambda: left @ right)["aten.mm"]
    assert (part.calls, part.operations, part.bytes) == (1, 2 * 30 * 20 * 10, 4 * (600 + 200 + 300))


def test_an_expanded_tensor_has_the_bytes_it_holds():
    row, many = torch.randn(1, 50), torch.randn(20, 50)
    assert found(lambda: row.expand(20, 50) * many)["aten.mul"].bytes == 4 * (50 + 1000 + 1000)


@pytest.mark.parametrize("rows", [30, ROWS_TO_REORDER])
@torch.no_grad()
def test_a_linear_layer_has_the_operations_and_bytes_of_its_product(rows):
    layer, x = Linear(20, 10, bias=False), torch.randn(rows, 20)
    part = max(found(lambda: layer(x)).values(), key=lambda part: part.operations)
    assert (part.operations, part.bytes) == (2 * rows * 20 * 10, 4 * (rows * 20 + 200 + rows * 10))


def test_sparse_attention_has_the_operations_of_its_kept_blocks():
    q, k, v = (torch.randn(1, 3, LAYOUT.tokens, 16, requires_grad=True) for _ in range(3))
    mask = nabla_mask(q, k, LAYOUT, 0.5)
    sparse = found(lambda: block_sparse_attention(q, k, v, mask).sum().backward())
    dense = found(lambda: scaled_dot_product_attention(q, k, v).sum().backward())
    of_dense = 4 * 3 * LAYOUT.tokens**2 * 16
    assert sparse["k5.block_sparse_attention"].operations == pytest.approx(mask.density * of_dense)
    assert sparse["k5.block_sparse_attention_backward"].operations == pytest.approx(2.5 * mask.density * of_dense)
    assert dense["aten._scaled_dot_product_flash_attention_for_cpu"].operations == of_dense
    assert dense["aten._scaled_dot_product_flash_attention_for_cpu_backward"].operations == 2.5 * of_dense


def test_attention_to_every_block_has_the_operations_of_dense_attention_on_a_grid_of_any_sides():
    ragged = TokenLayout(((3, 9, 13),))
    q, k, v = (torch.randn(2, 3, ragged.tokens, 16) for _ in range(3))
    every = nabla_mask(q[:1], k[:1], ragged, 1.0)
    ours = found(lambda: block_sparse_attention(q, k, v, every))["k5.block_sparse_attention"]
    dense = found(lambda: attention(q, k, v, "native", ragged))["k5.block_sparse_attention"]
    assert ours.operations == dense.operations == 4 * 2 * 3 * ragged.tokens**2 * 16


ROOF = Roof(operations=100.0, bandwidth=10.0, attention=200.0)


def test_the_limit_is_the_slower_of_products_and_memory():
    assert ROOF.share([Part("forward", "a", seconds=4.0, operations=200.0, bytes=10.0)]) == 0.5
    assert ROOF.share([Part("forward", "b", seconds=4.0, operations=100.0, bytes=40.0)]) == 1.0


def test_attention_has_a_limit_of_its_own():
    assert ROOF.share([Part("forward", "k5.block_sparse_attention", seconds=4.0, operations=200.0)]) == 0.25


def test_a_step_stands_as_near_its_limit_as_its_parts_together():
    product = Part("forward", "aten.mm", 1, seconds=4.0, operations=300.0)
    copy = Part("forward", "aten.clone", 1, seconds=1.0, bytes=5.0)
    assert limit([product, copy], ROOF) == "the step takes 5 s, its limits alone 3.5 s: 70.0% of the limit"


def test_rates_are_of_operations_or_else_of_bytes():
    product = Part("forward", "aten.mm", 1, seconds=4.0, operations=3e11, bytes=1e9)
    copy = Part("forward", "aten.clone", 1, seconds=1.0, bytes=5e9)
    cells = rows([product, copy], Roof(1e11, 1e10, 1e11))
    assert [row[-2:] for row in cells[:2]] == [["75 GFLOP/s", "75%"], ["5.0 GB/s", "50%"]]


def test_the_table_fits_a_terminal_of_80_columns():
    parts = [Part("forward", "aten._scaled_dot_product_flash_attention_for_cpu", 1, 12.345678, 1.2e12, 1e9)]
    parts.append(Part("forward", "aten.mm", 12, 10.0, 9e11, 1e9))
    printed = Console(width=80, file=StringIO())
    printed.print(table("a block", HEADER, rows(parts, Roof(1e11, 1e10, 2e11))))
    lines = printed.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(" 12346 " in line and "_for_cpu" in line for line in lines)


def run(*words: str, out: Path) -> Result:
    return CliRunner().invoke(app, ["--clip", "1x8x8", "--out", str(out), *words])


@pytest.mark.slow
def test_a_step_is_profiled_forward_and_backward(tmp_path):
    done = run("--backward", out=tmp_path)
    assert done.exit_code == 0, done.output
    assert "whole" in done.stdout
    assert "% of the limit" in done.stdout.splitlines()[-1]
    written = json.loads((tmp_path / "profile.json").read_text())
    names = {(part["phase"], part["name"]) for part in written["parts"]}
    assert {("forward", "aten.addmm"), ("forward", "k5.nabla_mask")} <= names
    assert ("backward", "k5.block_sparse_attention_backward") in names
    assert (tmp_path / "profile.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clip", "31"], "--clip: expected tokens as 31x16x24, got '31'"),
        (["--preset", "huge"], "expected a preset of ['image_lite', 'video_lite', 'video_pro']"),
    ],
)
def test_wrong_words_are_refused_in_one_line(tmp_path, words, message):
    refused = run(*words, out=tmp_path)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert message in refused.stderr
    assert list(tmp_path.iterdir()) == []
