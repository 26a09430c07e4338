"""Random damage to vendor files: a ValueError or a store, never anything between."""

import random
import shutil

import pandas as pd
import pytest

from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import read_bars, read_meta

CELLS = [
    "",
    "-1",
    "0",
    "1e400",
    "abc",
    "99999999",
    "1e12",
    "inf",
    "２０２０",
    "2020-02-30",
]


def damage(file, rng):
    """Damage a CSV file in one of eight ways; return which."""
    kind = rng.choice(
        ["bytes", "cut", "swap", "repeat", "drop", "cell", "parquet", "empty"]
    )
    raw = file.read_bytes()
    lines = raw.split(b"\n")
    if kind == "bytes":
        data = bytearray(raw)
        for _ in range(3):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(bytes(data))
    elif kind == "cut":
        file.write_bytes(raw[: rng.randrange(len(raw))])
    elif kind in ("swap", "repeat"):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        if kind == "swap":
            lines[i], lines[j] = lines[j], lines[i]
        else:
            lines.insert(i, lines[j])
        file.write_bytes(b"\n".join(lines))
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        frame = pd.read_csv(file, dtype=str)
        if kind == "drop":
            frame = frame.drop(columns=rng.choice(list(frame.columns)))
        elif kind == "cell":
            at = rng.randrange(len(frame)), rng.randrange(frame.shape[1])
            frame.iloc[at] = rng.choice(CELLS)
        if kind == "parquet":
            target = file.with_suffix(".parquet")
            frame.to_parquet(target)
            data = bytearray(target.read_bytes())
            data[rng.randrange(len(data))] ^= 1 + rng.randrange(255)
            target.write_bytes(bytes(data))
            file.unlink()
        else:
            frame.to_csv(file, index=False)
    return kind


SLOW = (pytest.param(k, marks=pytest.mark.slow) for k in (1, 2))


@pytest.mark.parametrize("seed", [0, *SLOW])
def test_damaged_files_end_in_a_clear_error_or_a_sound_store(
    fake_vendors, tmp_path, seed
):
    rng = random.Random(seed)
    market = fake_vendors.build_market(days=16)
    preset = ["baostock", "akshare", "tushare"][seed]
    fake_vendors.write[preset](market, tmp_path / "good")
    refused = 0
    for _ in range(10):
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(tmp_path / "good", work)
        damage(rng.choice(sorted(work.rglob("*.csv"))), rng)
        try:
            ingest(tmp_path / "s", preset, data=work, overwrite=True)
        except ValueError as error:
            assert len(str(error)) > 30
            refused += 1
        else:
            assert read_meta(tmp_path / "s")["instruments"] >= 5
            assert len(read_bars(tmp_path / "s", ["SH600519"])) >= 1
        assert not list(tmp_path.glob(".s*"))
    assert refused >= 3
