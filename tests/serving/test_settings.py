"""Settings of the server are checked before anything is loaded, and the documents name what they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_vita.errors import ConfigError
from megatron_vita.inference.openai import Limits
from megatron_vita.serving.settings import ServerSettings
from tests.scripts import ROOT, load_script

SERVE = load_script("tools/serve.py")


def test_another_address_than_loopback_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="--api-key"):
            ServerSettings(host=host)
        assert not ServerSettings(host=host, api_key="k").loopback
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        assert ServerSettings(host=host).loopback


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000}, {"api_key": ""}, {"api_key": "zwölf"}, {"max_queue": 0}, {"header_timeout": -1.0},
        {"media_root": Path("nowhere")}, {"drain_timeout": float("nan")},
    ],
)  # fmt: skip
def test_wrong_settings_name_their_flag(wrong: dict[str, object]) -> None:
    name = next(iter(wrong)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{name}"):
        ServerSettings(**wrong)  # type: ignore[arg-type]


def test_limits_come_from_the_command_line() -> None:
    assert Limits.parse(["pictures=5", "video_seconds=1.5"]) == Limits(pictures=5, video_seconds=1.5)
    for wrong in ("pictures", "nothing=1", "pictures=many", "pictures=0", "pictures=1.5"):
        with pytest.raises(ConfigError, match=re.escape(wrong.partition("=")[0])):
            Limits.parse([wrong])


def test_prompt_tokens_can_be_limited() -> None:
    assert Limits.parse(["prompt_tokens=100"]).prompt_tokens == 100


def test_a_usage_error_costs_no_import(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert SERVE.main(["--model", str(tmp_path / "none")]) == 2
    assert SERVE.main(["--model", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert SERVE.main(["--model", str(tmp_path), "--limit", "pictures=x"]) == 2
    assert "--api-key" in capsys.readouterr().err


def test_the_document_has_every_limit_with_its_default() -> None:
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+|none) \|", text, re.MULTILINE))
    written = {name: "none" if value is None else f"{int(value):,}" for name, value in Limits().to_dict().items()}
    assert told == written


def test_an_address_of_another_machine_is_named() -> None:
    from megatron_vita.serving.run import _listen

    for host in ("192.0.2.1", "no such name"):
        with pytest.raises(ConfigError, match=f"--host {host}: no address of this machine"):
            _listen(ServerSettings(host=host, port=0, api_key="k"))
