from dataclasses import replace

from drills.catalogue import DRILLS, QUICK
from drills.matrix import Configuration, Edge, Left, Needs, configurations, left_out
from relay.call import Wire

PLAIN = Configuration(Wire.HTTP_V1, tls=False, edge=Edge.DIRECT)
GRPC = Configuration(Wire.GRPC, tls=False, edge=Edge.DIRECT)
FULL = Configuration(Wire.REST_V0, tls=True, edge=Edge.NGINX)


def test_every_combination_is_a_configuration() -> None:
    assert len(set(configurations())) == 12
    assert configurations([Wire.HTTP_V1], [False], [Edge.DIRECT]) == [PLAIN]
    assert str(PLAIN) == "http_v1, plain, direct"
    assert str(FULL) == "rest_v0, TLS, nginx"


def test_what_the_superlink_speaks() -> None:
    assert [column.upstream for column in (PLAIN, FULL, GRPC)] == [Wire.HTTP_V1, Wire.REST_V0, Wire.HTTP_V1]
    same = configurations(grpc_superlink=True)
    assert [column.wire for column in same] == [Wire.GRPC] * 4
    assert [column.upstream for column in same] == [Wire.GRPC] * 4
    assert str(same[0]) == "grpc to grpc, plain, direct"
    assert str(GRPC) == "grpc, plain, direct"


def test_no_node_can_present_a_key_over_grpc() -> None:
    assert {column.wire for column in configurations(keys=True)} == {Wire.HTTP_V1, Wire.REST_V0}


def test_what_a_drill_needs() -> None:
    assert Needs().missing(PLAIN) is None
    assert Needs(tls=True).missing(PLAIN) == "it is about TLS handshakes"
    assert Needs(edge=Edge.NGINX).missing(PLAIN) == "it is about nginx"
    assert Needs(readable=True).missing(PLAIN) is None
    unread = "the proxy before the relay has to read what nodes are told"
    assert Needs(readable=True).missing(FULL) == unread
    assert Needs(readable=True).missing(replace(GRPC, tls=True)) is None
    assert Needs(calls=True).missing(GRPC) is None
    opaque = configurations([Wire.GRPC], [False], [Edge.DIRECT], grpc_superlink=True)[0]
    assert Needs(calls=True).missing(opaque) == "the proxy before the SuperLink has to read its calls"
    assert Needs().missing(opaque) is None
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
