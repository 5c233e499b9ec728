"""The benchmark of writing gives one row for each length."""

import json

from benchmarks import write


def test_rows_by_length(tmp_path, capsys):
    file = tmp_path / "write.json"
    write.main(["--lengths=30,100", "--repeats=1", f"--json={file}"])
    rows = json.loads(file.read_text())["rows"]
    assert [row["length"] for row in rows] == [30, 100]
    assert all(row["tokens per second"] > 0 and row["ask"]["median"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 3
