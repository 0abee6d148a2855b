from drills.catalogue import DRILLS, QUICK
from drills.matrix import Configuration, Edge, Left, Needs, configurations, left_out
from relay.call import Wire

PLAIN = Configuration(Wire.HTTP_V1, tls=False, edge=Edge.DIRECT)
FULL = Configuration(Wire.REST_V0, tls=True, edge=Edge.NGINX)


def test_every_combination_is_a_configuration() -> None:
    assert len(set(configurations())) == 8
    assert configurations([Wire.HTTP_V1], [False], [Edge.DIRECT]) == [PLAIN]
    assert str(PLAIN) == "http_v1, plain, direct"
    assert str(FULL) == "rest_v0, TLS, nginx"


def test_what_a_drill_needs() -> None:
    assert Needs().missing(PLAIN) is None
    assert Needs(tls=True).missing(PLAIN) == "it is about TLS handshakes"
    assert Needs(edge=Edge.NGINX).missing(PLAIN) == "it is about nginx"
    assert Needs(plain=True).missing(PLAIN) is None
    assert Needs(plain=True).missing(FULL) == "the proxy before the relay has to read what nodes are told"
    not_direct = Needs(not_direct=((Wire.HTTP_V1, "it is ended"),))
    assert not_direct.missing(PLAIN) == "it is ended"
    assert not_direct.missing(Configuration(Wire.HTTP_V1, tls=False, edge=Edge.NGINX)) is None
    assert not_direct.missing(Configuration(Wire.REST_V0, tls=False, edge=Edge.DIRECT)) is None
    assert Needs(tls=True, edge=Edge.NGINX).missing(FULL) is None


def test_what_is_left_out_is_said() -> None:
    needs = [("anywhere", Needs()), ("handshakes", Needs(tls=True))]
    assert list(left_out(needs, [PLAIN, FULL])) == [Left("handshakes", PLAIN, "it is about TLS handshakes")]


def test_the_quick_drills_make_sense_without_tls_and_nginx() -> None:
    assert set(QUICK) <= set(DRILLS)
    assert all(DRILLS[name].needs.missing(PLAIN) is None for name in QUICK)
