"""Clusters as people write them, where megatron-core puts the ranks, and what their messages cost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from megatron.core.parallel_state import RankGenerator

from megavlm.errors import ConfigError, LayoutError, MegavlmError
from megavlm.plan.cluster import BOARDS, Cluster, Span, parse_cluster
from megavlm.plan.profile import CommOp, GroupName
from megavlm.platform.device import bf16_peak_tflops

THEIR_NAMES: dict[GroupName, str] = {"tp": "tp", "dp": "dp", "pp": "pp", "mp": "tp-pp"}
OPS: list[CommOp] = ["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
FILE = """
nodes: 3
gpus_per_node: 72
chip: {name: B300, bf16_tflops: 2250, fp8_tflops: 4500, memory_gib: 268, memory_gb_s: 8000}
inside: {gb_s: 900, latency_us: 3.4, small_latency_us: 0.5}
between: {gb_s: 100, reached: 0.8, latency_us: 9.6, small_latency_us: 2.7}
"""


@pytest.mark.parametrize(
    ("written", "nodes", "gpus", "chip"),
    [
        ("5x8xA100-80GB", 5, 8, "A100-80GB"),
        ("1x4xa100-40gb", 1, 4, "A100-40GB"),
        ("8xH100", 1, 8, "H100"),
        ("512 x 8 x h200", 512, 8, "H200"),
    ],
)
def test_a_cluster_is_read(written: str, nodes: int, gpus: int, chip: str) -> None:
    cluster = parse_cluster(written)
    assert (cluster.nodes, cluster.gpus_per_node, cluster.chip.name) == (nodes, gpus, chip)
    assert parse_cluster(cluster.name) == cluster


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("0x8xH100", "0 machines"),
        ("5x0xH100", "0 GPUs in a machine"),
        ("5x8", "write machines x GPUs"),
        ("5x8xA100", "A100-40GB or A100-80GB"),
        ("5x8xH10", "may be H100; write which"),
        ("5x8xH300", "did you mean H200? Known are"),
        ("5x8xA100-80BG", "did you mean A100-80GB?"),
        ("5x8xTPUv4", "any other is described in a YAML file"),
        ("2x64xH100", "64 GPUs in a machine"),
        ("99999999x8xH100", "more than"),
        ("-1x8xH100", "is no cluster"),
        ("", "is no cluster"),
        ("no-such-file.yaml", "cannot be read"),
    ],
)
def test_an_impossible_cluster_is_refused_in_one_line(written: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cluster(written)
    assert said in str(caught.value) and written in str(caught.value) and caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_cluster_of_other_chips_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(FILE)
    cluster = parse_cluster(str(tmp_path / "own.yaml"))
    assert cluster.gpus == 216 and cluster.chip.fp8_tflops == 4500
    assert cluster.between.bytes_per_second == pytest.approx(80e9) and cluster.inside.reached == 0.9
    (tmp_path / "slow.yaml").write_text(
        "nodes: 2\ngpus_per_node: 8\nchip: h100\nbetween: {gb_s: 12.5, latency_us: 20, small_latency_us: 9}"
    )
    slow = parse_cluster(str(tmp_path / "slow.yaml"))
    assert slow.chip == BOARDS["H100"].chip and slow.inside == BOARDS["H100"].inside and slow.between.gb_s == 12.5


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("nodes: 3", "nodes: 0", "Cluster.nodes = 0"),
        ("nodes: 3", "nodes: 300000", "more than"),
        ("gb_s: 900", "gb_s: -1", "inside.gb_s = -1"),
        ("reached: 0.8", "reached: 1.2", "between.reached = 1.2"),
        ("bf16_tflops", "bf16_teraflops", "chip.bf16_teraflops"),
        ("chip: {", "chip: B300\nother: {", "no known chip"),
    ],
)
def test_an_impossible_file_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "own.yaml").write_text(FILE.replace(old, new))
    with pytest.raises(MegavlmError) as caught:
        parse_cluster(str(tmp_path / "own.yaml"))
    assert said in str(caught.value)


def test_float32_has_a_peak_of_its_own(tmp_path: Path) -> None:
    """Without TF32, which torch leaves off: NVIDIA's data sheets."""
    peaks = {name: board.chip.flops_per_second(in_float32=True) / 1e12 for name, board in BOARDS.items()}
    assert peaks == {"A100-40GB": 19.5, "A100-80GB": 19.5, "H100": 67, "H200": 67}
    devices = ("A100-SXM4-40GB", "A100-SXM4-80GB", "H100 80GB HBM3", "H200")
    for name, device in zip(BOARDS, devices, strict=True):
        peak = bf16_peak_tflops(f"NVIDIA {device}")
        assert BOARDS[name].chip.flops_per_second(in_float32=False) == 1e12 * (peak or 0), "MFU as training logs it"
    (tmp_path / "own.yaml").write_text(FILE)
    with pytest.raises(ConfigError, match="fp32_tflops.*B300.*data sheet.*--params-dtype bfloat16"):
        parse_cluster(str(tmp_path / "own.yaml")).chip.flops_per_second(in_float32=True)


def test_groups_sit_where_megatron_core_puts_them() -> None:
    draw = random.Random(3)
    for _ in range(40):
        tensor, data, pipeline = draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 3, 8]), draw.choice([1, 2, 3, 4])
        per_node = draw.choice([d for d in (1, 2, 4, 8, 16) if (tensor * data * pipeline) % d == 0])
        cluster = parse_cluster(f"{tensor * data * pipeline // per_node}x{per_node}xH100")
        theirs = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
        for ours, token in THEIR_NAMES.items():
            nodes = [sorted({rank // per_node for rank in ranks}) for ranks in theirs.get_ranks(token)]
            span = cluster.span(ours, tensor, pipeline)
            assert span.ranks == len(theirs.get_ranks(token)[0])
            assert span.nodes == max(map(len, nodes))
        chains = theirs.get_ranks("pp")
        ways = [any(c[s] // per_node != c[(s + 1) % pipeline] // per_node for c in chains) for s in range(pipeline)]
        assert cluster.crossings(tensor, pipeline) == ways


def test_large_messages_take_what_the_bandwidth_says() -> None:
    cluster = parse_cluster("4x8xA100-80GB")
    size, nvlink, card = 8e9, 300e9 * 0.78, 25e9 * 0.9
    inside = cluster.span("tp", 8, 1)
    assert inside == Span(8, 1, 8)
    assert cluster.collective_seconds("all_reduce", size, inside) == pytest.approx(2 * 7 / 8 * size / nvlink, rel=0.01)
    assert cluster.collective_seconds("all_gather", size, inside) == pytest.approx(7 / 8 * size / nvlink, rel=0.01)
    one_card_each = cluster.span("dp", 8, 1)
    assert one_card_each == Span(4, 4, 1)
    expected = 3 / 4 * size / card
    assert cluster.collective_seconds("reduce_scatter", size, one_card_each) == pytest.approx(expected, rel=0.01)
    all_cards = cluster.span("dp", 1, 1)
    assert cluster.collective_seconds("all_gather", size, all_cards) == pytest.approx(
        31 / 32 * size / (8 * card), rel=0.02
    )
    assert cluster.collective_seconds("p2p", size, cluster.span("pp", 8, 4)) == pytest.approx(size / card, rel=0.01)


def test_small_messages_take_what_latency_says_and_time_grows_with_size_and_ranks() -> None:
    draw = random.Random(5)
    for _ in range(50):
        nodes, op = draw.choice([1, 2, 8, 64, 512]), draw.choice(OPS)
        cluster = parse_cluster(f"{nodes}x8xH100")
        span = cluster.span("world", 1, 1)
        sizes = sorted(10 ** draw.uniform(0, 10) for _ in range(4))
        times = [cluster.collective_seconds(op, size, span) for size in sizes]
        assert times == sorted(times) and times[0] >= 3.6e-6
        more = cluster.with_gpus(cluster.gpus * 2)
        assert more.collective_seconds(op, sizes[0], more.span("world", 1, 1)) > times[0]
    many = parse_cluster("512x8xH100")
    # A ring of 4,096 would take 80 ms around; a tree does not.
    assert many.collective_seconds("all_reduce", 4e6, many.span("world", 1, 1)) < 5e-3


def test_one_rank_sends_nothing() -> None:
    cluster = parse_cluster("1x8xH100")
    assert cluster.collective_seconds("all_reduce", 1e9, cluster.span("tp", 1, 1)) == 0


def test_a_cluster_grows_by_whole_machines() -> None:
    cluster = parse_cluster("5x8xA100-80GB")
    assert cluster.with_gpus(4096).name == "512x8xA100-80GB" and cluster.with_gpus(4).name == "1x4xA100-80GB"
    with pytest.raises(LayoutError, match="use 8 or 16"):
        cluster.with_gpus(12)


def test_files_and_text_write_the_same_cluster() -> None:
    cluster = parse_cluster("2x8xH200")
    assert Cluster.from_yaml(cluster.to_yaml()) == cluster
