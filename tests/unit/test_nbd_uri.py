from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.nbd.uri import Credentials, NbdAddress, is_uri, parse

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("nbd://example.com:10809/disk", NbdAddress("disk", host="example.com", port=10809)),
        ("nbd://example.com/", NbdAddress("", host="example.com", port=10809)),
        ("nbd://example.com", NbdAddress("", host="example.com", port=10809)),
        ("nbd://example.com//disk", NbdAddress("/disk", host="example.com", port=10809)),
        ("nbd://example.com/hello%20world", NbdAddress("hello world", host="example.com", port=10809)),
        ("nbd://[::1]:99/a", NbdAddress("a", host="::1", port=99)),
        ("nbd://[fe80::1%25enP2p1s0.7]/a", NbdAddress("a", host="fe80::1%enP2p1s0.7", port=10809)),
        ("nbd://[FE80::1%lo]/a", NbdAddress("a", host="fe80::1%lo", port=10809)),
        ("nbd://[fe80::1%2525g]/a", NbdAddress("a", host="fe80::1%25g", port=10809)),
        ("NBD://Example.COM/Disk", NbdAddress("Disk", host="example.com", port=10809)),
        ("nbd:///disk", NbdAddress("disk", host="localhost", port=10809)),
        ("nbd+unix:///disk?socket=nbd.sock", NbdAddress("disk", socket_path="nbd.sock")),
        ("nbd+unix://?socket=/a+b%26c", NbdAddress("", socket_path="/a+b&c")),
        ("nbds://host/disk", NbdAddress("disk", host="host", port=10809, tls=Credentials())),
        ("NBDS+unix:///?socket=/s", NbdAddress("", socket_path="/s", tls=Credentials())),
        (
            "nbds://host:1/d?tls-hostname=A.org&tls-certificates=/etc/p%20q&tls-type=x509",
            NbdAddress("d", host="host", port=1, tls=Credentials("/etc/p q", "a.org")),
        ),
        (
            "nbds+unix:///d?tls-verify-peer=0&socket=/s&tls-hostname=::1",
            NbdAddress("d", socket_path="/s", tls=Credentials(hostname="::1", verifies=False)),
        ),
        ("nbds://[::1]/?tls-verify-peer=true", NbdAddress("", host="::1", port=10809, tls=Credentials())),
    ],
)
def test_uri_names_a_place(uri: str, place: NbdAddress) -> None:
    assert parse(uri) == place
    assert parse(place.uri) == place


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nbds://host/disk?socket=/s", "mean nothing here: socket"),
        ("nbds+unix:///disk", "which socket"),
        ("nbds://host/?tls-type=psk", "certificates alone"),
        ("nbds://host/?tls-certificates=", "tls-certificates is empty"),
        ("nbds://host/?tls-hostname=a_b%20c", "no name or address"),
        ("nbds://host/?tls-verify-peer=no", "either true or false"),
        ("nbds://host/?tls-certificates=/a&tls-certificates=/b", "twice"),
        ("nbds://host/?tls-priority=x", "tls-priority"),
        ("nbd://host/?tls-certificates=/a", "mean nothing here: tls-certificates"),
        ("http://host/disk", "begins with neither nbd://"),
        ("nbd://user@host/disk", "user names"),
        ("nbd://host/disk#part", "fragments"),
        ("nbd://host:http/disk", "http"),
        ("nbd://host:99999/disk", "ort"),
        ("nbd://host:0/disk", "port 0"),
        ("nbd://local\0host/disk", "no name or address"),
        ("nbd://[v1.[v1.x]/disk", "no name or address"),
        ("nbd://ho%20st/disk", "no name or address"),
        ("nbd://a..b/disk", "no name or address"),
        ("nbd://a%b/disk", "no name or address"),
        ("nbd://[fe80::1%25]/disk", "no name or address"),
        ("nbd://host/a\nb", "a tab or a line break"),
        ("nbd+unix:///?socket=/a\tb", "a tab or a line break"),
        ("nbds://host/?tls-hostname=" + 64 * "a", "no name or address"),
        ("nbd://host/%ff", "UTF-8"),
        ("nbd://\udcff/", "utf-8"),
        ("nbd://host/%00", "NUL"),
        ("nbd://host/disk?socket=/s", "parameters that mean nothing here: socket"),
        ("nbd+unix:///disk", "which socket"),
        ("nbd+unix:///disk?socket=", "which socket"),
        ("nbd+unix://disk?socket=/s", "three slashes"),
        ("nbd+unix:///?socket=/s&socket=/t", "twice"),
        ("nbd+unix:///?socket=/s&tls-type=psk", "tls-type"),
        ("nbd+unix:///?socket=/" + "s" * 107, "107"),
        ("nbd://host/" + "e" * 4097, "4096"),
    ],
)
def test_uri_that_cannot_be_used_is_refused_in_one_sentence(uri: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said) as refused:
        parse(uri)
    assert "\n" not in str(refused.value)


def test_paths_are_no_uris() -> None:
    for image in ("/srv/nbd.raw", "nbd", "nbd:/x", "http://host/x", "nbdx://host/x", "./nbd+unix:///x"):
        assert not is_uri(image)
    for image in ("nbd://x", "NBD://x", "nbd+unix:///x", "nbds://x", "nbds+unix:///x"):
        assert is_uri(image)


def test_name_that_the_certificate_must_have_is_the_hosts_unless_another_is_given() -> None:
    certified = {
        "nbds://host/": "host",
        "nbds:///": "localhost",
        "nbds://[fe80::1%25eth0]/": "fe80::1",
        "nbds+unix:///?socket=/s": "localhost",
        "nbds://10.0.0.1/?tls-hostname=store.example": "store.example",
    }
    assert {uri: parse(uri).certified_name for uri in certified} == certified


@given(name=names, path=names.filter(lambda text: 0 < len(text.encode()) < 100))
def test_what_our_server_calls_itself_leads_back_to_it(name: str, path: str) -> None:
    for place in (
        NbdAddress(name, socket_path="/" + path),
        NbdAddress(name, host="::1", port=5),
        NbdAddress(name, host="a", port=5, tls=Credentials()),
    ):
        assert parse(place.uri) == place


def test_an_address_of_ipv6_is_bracketed() -> None:
    assert NbdAddress("a/b", host="fe80::1", port=10809).uri == "nbd://[fe80::1]:10809/a%2Fb"


@given(text=st.text(max_size=60))
def test_any_text_is_a_place_or_refused(text: str) -> None:
    behind = ("", "nbd://", "nbd+unix://", "nbd+unix:///?socket=", "nbds://", "nbds://h/?tls-certificates=")
    for uri in (before + text for before in (*behind, "nbds+unix:///?socket=/s&tls-hostname=")):
        try:
            place = parse(uri)
        except InvalidArgument:
            continue
        assert parse(place.uri) == place
