"""Proxy and certificate settings that httpx rejects: the error names the variable and hides the password."""

import pytest

from schemas.http_client import ClientSettingsError, create_http_client, find_proxy_variable

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ALL_PROXY", "socks://u:secret@127.0.0.1:7890/", "socks://***@127.0.0.1:7890/"),
        ("all_proxy", "socks5://u:secret@127.0.0.1:7890", "socksio"),
        ("HTTPS_PROXY", "ftp://p:1", "schemes of a proxy"),
        ("HTTP_PROXY", "“http://p:1”", "schemes of a proxy"),
        ("HTTP_PROXY", "http://u:secret@p:port", "not a valid URL"),
        ("NO_PROXY", "localhost,[::1]", "entry [::1]"),
        ("no_proxy", "fd00::/8", "entry fd00::/8"),
        ("SSL_CERT_FILE", "/no/such/file", "No such file"),
    ],
)
def test_unusable_setting_is_named_without_its_password(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(ClientSettingsError) as caught:
        create_http_client()
    error = caught.value
    assert words in error.why and error.fix and name in error.what + error.why
    assert "secret" not in error.what + error.why + error.fix


def test_usable_settings_make_a_client(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "localhost,::1,10.0.0.0/8,.example")
    create_http_client().close()
    assert find_proxy_variable("http://api.test/v1") == "HTTP_PROXY"
    assert find_proxy_variable("http://localhost:8000/v1") == find_proxy_variable("https://api.test/v1") == ""
