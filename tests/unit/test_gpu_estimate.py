"""The estimate of an H100 in docs/project/performance.md is that of its script and of the counts that are stored."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_estimate  # noqa: E402

PAGE = ROOT / "docs" / "project" / "performance.md"
COUNTS = json.loads(gpu_estimate.COUNTS.read_text())


def test_the_page_is_current():
    page = PAGE.read_text()
    assert page == gpu_estimate.with_estimate(page, COUNTS), (
        f"python benchmarks/gpu_estimate.py --page {PAGE.relative_to(ROOT)}"
    )


def test_the_arithmetic_of_a_step():
    kinds = {
        "products": {"operations": 100, "read": 3.35e9, "written": 3.35e8},  # 1.1 ms of bandwidth, 0.2 ms of kernels
        "casts": {"operations": 300, "read": 3.35e6, "written": 0},  # 1 us of bandwidth, 0.6 ms of kernels
    }
    counted = {"by_kind": kinds, "operations": 400, "operations_around": 50, "floor_bytes": {"total": 3.35e9}}
    step = gpu_estimate.step(counted)
    assert step.seconds == pytest.approx(1.1e-3 + 0.6e-3 + 50 * 2e-6)
    assert step.share == pytest.approx(1e-3 / step.seconds)


def test_a_compiled_step_has_the_same_products_and_the_kernels_of_the_compiler():
    kinds = {
        "products": {"operations": 100, "read": 3.35e9, "written": 0},  # 1 ms of bandwidth
        "casts": {"operations": 300, "read": 3.35e8, "written": 0},  # 0.1 ms
        "copies": {"operations": 200, "read": 0, "written": 3.35e8},  # 0.1 ms
    }
    counted = {"by_kind": kinds, "operations": 600, "operations_around": 0, "floor_bytes": {"total": 3.35e9}}
    of_many, of_few = (gpu_estimate.compiled(counted, {"step": kernels}) for kernels in (300, 110))
    assert of_many["operations"] == 300
    assert gpu_estimate.step(of_many).seconds == pytest.approx(1e-3 + 200 * 2e-6)
    assert gpu_estimate.step(of_few).seconds == pytest.approx(1e-3 + 2e-4)


def test_the_arithmetic_of_a_phase():
    assert gpu_estimate.attended(flex=False) == 1152**2
    assert gpu_estimate.attended(flex=True) == 29 * 128**2  # of 81 blocks: 1, and for each answer 4 and 10
    counts = gpu_estimate.of_model(COUNTS["now"], "qwen2.5-0.5b")
    reference, forward, backward, _ = gpu_estimate.phases(gpu_estimate.MODELS["qwen2.5-0.5b"], counts, flex=True)
    body, head = 24 * (2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864), 151936 * 896
    assert forward.products == pytest.approx((2 * body * 16128 + 2 * head * 14336) / 990e12 / 0.75)
    assert backward.useful == 2 * forward.useful == 2 * reference.useful
    assert backward.products == pytest.approx(2 * forward.products + 2 * head * 14336 / 990e12 / 0.75)


def test_counts_of_the_head_are_those_of_the_code():
    assert COUNTS["now"]["head"] == gpu_estimate.head_counts(fused=True)
    assert COUNTS["before"]["head"] == gpu_estimate.head_counts(fused=False)
    assert COUNTS["now"]["chunk_logits"] == gpu_estimate.CHUNK_LOGITS_ELSEWHERE
