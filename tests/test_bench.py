"""The benchmark's table and its choice of topics; how long anything takes is asserted nowhere."""

import json

import numpy as np
import pytest
import torch

from bench import card, denoising, memory, metrics, steps, svd, synthesis
from bench.command import TOPICS, chosen, main
from bench.maps import anomaly_maps
from bench.table import Row, to_markdown
from diffad_ref import DecoDiff, DiffusionAD, OneForMore
from diffad_ref.tools.records import device_name

CPU = torch.device("cpu")


def cells(row):
    return [cell.strip() for cell in to_markdown([row]).splitlines()[2].split("|")[1:-1]]


def test_ratio_says_how_many_times_as_much_the_rival_needs():
    row = Row("topic", "what", 0.5, "s", "other code", 6.0, target=10)
    assert row.ratio == 12
    assert cells(row) == ["topic", "what", "0.5 s", "other code", "6 s", "12", "10", "yes", ""]


def test_missed_target_is_marked_in_the_table():
    assert cells(Row("topic", "what", 2.0, rival="limit", there=1.0, target=1))[7] == "no"


def test_row_of_what_was_not_measured_has_no_ratio_but_words():
    row = Row("topic", "what", 2.0, rival="ADEval", target=1 / 3, note="ADEval is not installed")
    assert row.met is None
    assert cells(row)[4:] == ["", "", "0.333", "", "ADEval is not installed"]


def test_all_lines_of_the_table_have_the_same_number_of_cells():
    lines = to_markdown([Row("a", "b"), Row("c", "d", 1.0, there=2.0)]).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {10}


def test_unknown_topic_is_refused_with_the_topics_that_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "svd,speed"])
    assert f"unknown topic 'speed'; there are {', '.join(TOPICS)}" in capsys.readouterr().err


def test_topics_are_chosen_in_the_order_given():
    assert chosen("svd, metrics") == ["svd", "metrics"]


def test_command_writes_the_table_and_its_rows_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TOPICS, "svd", lambda device: [Row("svd", "nothing", 1.0)])
    threads = str(torch.get_num_threads())
    main(["--only", "svd", "--device", "cpu", "--threads", threads, "--json", "rows.json"])
    text = (tmp_path / "build/bench.md").read_text()
    assert text.startswith(f"**torch {torch.__version__}, device cpu, {threads} threads, CPU ")
    assert "| svd | nothing | 1 s |" in text and text in capsys.readouterr().out
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["device"] == device_name(torch.device("cpu"))
    assert record["versions"]["torch"] == torch.__version__
    assert record["rows"] == [Row("svd", "nothing", 1.0).to_dict()]


def test_anomaly_maps_have_the_wanted_share_of_defects_and_higher_values_in_them():
    maps, masks = anomaly_maps(20, 64)
    assert masks.any((1, 2)).sum() == 15 and masks[15:].sum() == 0
    assert maps[masks].mean() > maps[~masks].mean() + 0.05
    assert np.array_equal(maps, anomaly_maps(20, 64)[0])


def test_peak_memory_is_not_measured_where_the_system_does_not_say(tmp_path):
    assert memory.peak_of_this_process(tmp_path / "status") is None
    (tmp_path / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t 2000000 kB\n")
    assert memory.peak_of_this_process(tmp_path / "status") == pytest.approx(2.048)


def test_rows_appear_where_no_rival_is_installed(monkeypatch):
    def absent(*data):
        raise ImportError

    monkeypatch.setattr(metrics, "anomalib_aupro", absent)
    monkeypatch.setattr(metrics, "adeval_metrics", absent)
    rows = metrics.rows(CPU, count=8, size=32, rounds=1)
    assert rows[0].rival == "scikit-learn's six" and rows[0].ratio is not None
    assert rows[0].note == "anomalib is not installed"
    assert "ADEval is not installed" in {row.note for row in rows if row.ratio is None}


def test_metrics_agree_with_those_of_scikit_learn():
    maps, masks = anomaly_maps(8, 32)
    data = (maps, masks, maps.max((1, 2)), masks.any((1, 2)))
    assert metrics.largest_difference(metrics.seven(*data), metrics.by_sklearn(*data)) < 1e-9


def test_iterative_svd_of_falling_spectra_holds_less_and_keeps_the_energy():
    found = svd.rows(CPU, layers=((40, 400),), chunks=20, rounds=1)
    time, memory_, energy, added, single = found
    assert memory_.met and energy.met and time.target is None
    assert single.met and added.there == time.here


def test_one_guided_step_is_measured_against_walks_that_call_the_network_more_often():
    ddim, ddpm = denoising.rows(CPU, batch=1, level=5, calls=3, rounds=1)
    assert (ddim.note, ddpm.note) == ("3 calls", "6 calls") and ddim.here == ddpm.here > 0


def test_each_stage_has_a_training_step_and_each_method_a_prediction():
    step, prediction = steps.rows(CPU, (DecoDiff,), rounds=1)
    assert step.measured == "DecoDiff: training step, correction, batch of 16"
    assert prediction.measured == "DecoDiff: prediction of one image"


def test_perlin_masks_are_measured_for_each_image():
    (row,) = synthesis.rows(CPU, batch=2, size=32, few=1)
    assert row.unit == "ms" and row.here > 0 and row.there > 0


def test_memory_of_the_metrics_is_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(memory, "in_child", memory.judge)  # here in this one, which is quicker
    time, peak = memory.rows(CPU, count=8, size=32)
    assert time.here > 0 and (peak.here is None or peak.rival == "limit")


def test_what_does_not_fit_costs_no_other_row(monkeypatch):
    def large(detector, case, device, rounds):
        yield card.Row("card", "small", 1.0)
        raise torch.cuda.OutOfMemoryError

    def next_one(detector, case, device, rounds):
        yield card.Row("card", "next", 1.0)

    monkeypatch.setattr(card, "CASES", (card.Case(OneForMore, 2, 1.0, 1.0, {1: 1.0}),))
    monkeypatch.setattr(card, "_protection", large)
    monkeypatch.setattr(card, "_plain", next_one)
    found = card.rows(CPU, "tiny", rounds=1, compiled=False)
    assert [row.measured for row in found] == ["small", "OneForMore: what comes next", "next"]
    assert [row.note for row in found] == ["", "out of memory", ""]


def test_a_card_is_measured_at_every_precision_and_a_cpu_not_at_all(monkeypatch):
    assert card.rows(CPU) == []
    tiny = card.Case(OneForMore, 2, 1.0, 1.0, {1: 1000.0})
    monkeypatch.setattr(card, "CASES", (tiny,))
    monkeypatch.setattr(card, "GATHERED", 2)
    found = card.rows(CPU, "tiny", rounds=1, compiled=False)
    words = " ".join(row.measured for row in found)
    assert all(f"batch 2, {kind}" in words for kind in card.PRECISIONS)
    assert "prediction of 1, bf16" in words and "gathering, an image" in words
    assert all(row.here > 0 for row in found) and "projected" in words


@pytest.mark.parametrize("method", [DiffusionAD, DecoDiff, OneForMore])
def test_making_anomalies_is_measured_for_methods_that_make_some(method):
    case = card.Case(method, 2, 1.0, None, {})
    found = list(card._anomalies(card._detector(case, "tiny", CPU), case, CPU, rounds=1))
    assert len(found) == (method is not DecoDiff) and all(row.here > 0 for row in found)
