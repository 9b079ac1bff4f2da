"""Keys: rights, quotas and files of them; a key is never shown."""

import hashlib
import threading
from pathlib import Path

import pytest

from loralab.errors import ConfigError
from loralab.serving.http.keys import DAY, Grant, Key, Keys, Refusal, read

SECRET = "correct horse battery"


class Clock:
    """Seconds that pass when they are told to."""

    now = 10 * DAY + 5.0

    def __call__(self) -> float:
        return self.now


def key(name: str = "ci", **rights: object) -> Key:
    return Key(name=name, sha256=hashlib.sha256(SECRET.encode()).digest(), **rights)  # type: ignore[arg-type]


def test_a_key_is_found_by_its_secret_alone() -> None:
    keys = Keys([key()])
    assert keys.find(SECRET) is keys.keys[0]
    assert keys.find(SECRET + "x") is None
    assert keys.find("") is None
    assert keys.find(None) is None
    assert keys.find("☃") is None


def test_rights_name_adapters_one_by_one() -> None:
    narrow = key(adapters=("sst",), base=False)
    assert narrow.may_use("sst")
    assert not narrow.may_use("news")
    assert not narrow.may_use(None)
    assert key().may_use("anything")
    assert key().may_use(None)


def test_requests_of_the_last_minute_count() -> None:
    clock = Clock()
    keys = Keys([key(requests_per_minute=2)], clock)
    mine = keys.keys[0]
    assert isinstance(keys.admit(mine, 0), Grant)
    clock.now += 30
    assert isinstance(keys.admit(mine, 0), Grant)
    refused = keys.admit(mine, 0)
    assert isinstance(refused, Refusal)
    assert refused.seconds == 31
    clock.now += refused.seconds
    assert isinstance(keys.admit(mine, 0), Grant)
    assert isinstance(keys.admit(mine, 0), Refusal)


def test_tokens_are_set_aside_until_they_are_used() -> None:
    clock = Clock()
    keys = Keys([key(tokens_per_day=100)], clock)
    mine = keys.keys[0]
    grant = keys.admit(mine, 60)
    assert isinstance(grant, Grant)
    refused = keys.admit(mine, 60)
    assert isinstance(refused, Refusal)
    assert "40 of its 100 tokens" in refused.reason
    assert refused.seconds <= DAY
    keys.settle(grant, 10)
    assert keys.used_today(mine) == 10
    late = keys.admit(mine, 90)
    assert isinstance(late, Grant)
    clock.now += DAY
    assert keys.used_today(mine) == 0
    keys.settle(late, 90)  # of yesterday
    assert keys.used_today(mine) == 0


def test_many_threads_never_exceed_a_quota_together() -> None:
    keys = Keys([key(tokens_per_day=1000, requests_per_minute=10_000)])
    admitted: list[Grant] = []

    def ask() -> None:
        for _ in range(100):
            found = keys.admit(keys.keys[0], 7)
            if isinstance(found, Grant):
                admitted.append(found)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 1000 // 7


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    digest = hashlib.sha256(b"another secret of mine").hexdigest()
    file.write_text(
        f'[[key]]\nname = "a"\nkey = "{SECRET}"\nadapters = ["sst"]\nbase = false\n'
        f'[[key]]\nname = "b"\nsha256 = "{digest}"\nadmin = true\nrequests_per_minute = 5\n'
        "tokens_per_day = 10\n"
    )
    keys = read(file)
    first, second = keys.find(SECRET), keys.find("another secret of mine")
    assert first is not None
    assert second is not None
    assert (first.name, first.adapters, first.base, first.admin) == ("a", ("sst",), False, False)
    assert (second.name, second.sees_all, second.admin) == ("b", True, True)
    assert SECRET not in repr(keys.keys)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "not_keys"),
        ("x = 1", "not_keys"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET}', "invalid_toml"),
        ("[[key]]\nkey = '0123456789abcdef'", "missing_field"),
        ("[[key]]\nname = 'a'", "key_or_sha256"),
        ("[[key]]\nname = 'a'\nkey = 'short secret'", "short_key"),
        ("[[key]]\nname = 'a'\nsha256 = 'zz'", "invalid_value"),
        ("[[key]]\nname = 'a'\nkey = '0123456789abcdef'\nadapter = ['x']", "unknown_field"),
        ("[[key]]\nname = 'a'\nkey = '0123456789abcdef'\nadapters = 'x'", "invalid_value"),
        ("[[key]]\nname = 'a'\nkey = '0123456789abcdef'\nadapters = [1]", "invalid_value"),
        ("[[key]]\nname = 'a'\nkey = '0123456789abcdef'\nadmin = 1", "invalid_value"),
        ("[[key]]\nname = 'a'\nkey = '0123456789abcdef'\ntokens_per_day = 0", "invalid_value"),
        ("[[key]]\nname = 'a'\nkey = '0123456789abcdef'\ntokens_per_day = true", "invalid_value"),
        ("[[key]]\nname='a'\nkey='0123456789abcdef'\n[[key]]\nname='a'\nkey='0123456789abcdeg'", "repeated_value"),
        ("[[key]]\nname='a'\nkey='0123456789abcdef'\n[[key]]\nname='b'\nkey='0123456789abcdef'", "repeated_value"),
    ],
)
def test_a_wrong_file_is_refused_and_shows_no_key(content: str, code: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(content)
    with pytest.raises(ConfigError) as found:
        read(file)
    assert found.value.code == code
    for secret in (SECRET, "0123456789abcdef", "short secret"):
        assert secret not in str(found.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "none.toml")
    assert (error.value.code, error.value.field) == ("cannot_read", "keys")
