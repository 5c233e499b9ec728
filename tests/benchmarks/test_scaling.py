"""What devices compute as more are added, from counts; the compilations take minutes."""

import json

import pytest

from benchmarks import report, scaling


def counts(*flops):
    row = {"sent": 2.0**20}
    return {
        str(8 * 4**i): {name: row | {"flops": each} for name in scaling.MESHES}
        for i, each in enumerate(flops)
    }


def test_the_spread_is_of_the_extremes():
    assert scaling.spread(counts(100.0, 105.0, 98.0), "all share") == pytest.approx(105 / 98 - 1)


def test_the_batch_grows_with_the_devices_and_every_mesh_takes_them():
    for devices in (8, 32, 256, 1024):
        assert scaling.shape_of(devices).rows == 2 * devices
        for mesh in scaling.MESHES.values():
            sizes = mesh.sizes(devices)
            assert scaling.shape_of(devices).rows % (sizes["data"] * sizes["fsdp"]) == 0
            assert scaling.WIDTH % (sizes["fsdp"] * sizes["tensor"]) == 0


def test_results_become_a_plot_and_a_table(tmp_path, capsys):
    found = counts(1e9, 1e9)
    scaling.plot(found, str(tmp_path / "plot.svg"))
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    file = tmp_path / "scaling.json"
    file.write_text(json.dumps({"machine": {}, "scaling": found}))
    report.main([str(file)])
    said = capsys.readouterr().out
    assert (
        "| mesh | | 8 | 32 devices |" in said and "| all share | GFLOPs | 1.000 | 1.000 |" in said
    )


@pytest.mark.parametrize("devices", ["8,x", "12", "2048"])
def test_counts_that_do_not_fit_are_refused(devices):
    with pytest.raises(SystemExit):
        scaling.main([f"--devices={devices}"])
