"""Our port mapping through miniupnpc against a router that speaks UPnP over HTTP on loopback."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

import pytest

from p2pswarm.net.nat.port_mapping import LEASE_S, MappedPort, PortMapper

pytestmark = pytest.mark.real

SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"
DESCRIPTION = f"""<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><device>
 <deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType>
 <deviceList><device><deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType>
  <serviceList><service><serviceType>urn:schemas-upnp-org:service:WANCommonInterfaceConfig:1</serviceType>
   <controlURL>/common</controlURL><eventSubURL>/e</eventSubURL><SCPDURL>/s</SCPDURL></service></serviceList>
  <deviceList><device><deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType>
   <serviceList><service><serviceType>{SERVICE}</serviceType>
    <controlURL>/control</controlURL><eventSubURL>/e</eventSubURL><SCPDURL>/s</SCPDURL></service></serviceList>
  </device></deviceList></device></deviceList>
</device></root>"""
ENVELOPE = """<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"
 s:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>{}</s:Body></s:Envelope>"""
CONFLICT = """<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail><UPnPError
 xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>718</errorCode><errorDescription>ConflictInMappingEntry
</errorDescription></UPnPError></detail></s:Fault>"""


class FakeRouter(ThreadingHTTPServer):
    """Knows what miniupnpc asks a router: its state, its address, and mappings."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RouterRequest)
        self.mappings: dict[int, dict[str, str]] = {}
        self.taken: set[int] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/description.xml"

    def carry_out(self, action: str, fields: dict[str, str]) -> str | None:
        """The fields of the answer; None for a refusal."""
        match action:
            case "GetStatusInfo":
                return "<NewConnectionStatus>Connected</NewConnectionStatus><NewUptime>9</NewUptime>"
            case "GetExternalIPAddress":
                return "<NewExternalIPAddress>8.8.4.4</NewExternalIPAddress>"
            case "AddPortMapping":
                if int(fields["NewExternalPort"]) in self.taken:
                    return None
                self.mappings[int(fields["NewExternalPort"])] = fields
            case "DeletePortMapping":
                del self.mappings[int(fields["NewExternalPort"])]
        return ""


class RouterRequest(BaseHTTPRequestHandler):
    server: FakeRouter

    def do_GET(self) -> None:
        self._reply(200, DESCRIPTION)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        action = self.headers["SOAPAction"].strip('"').rpartition("#")[2]
        answer = self.server.carry_out(action, dict(re.findall(r"<(New\w+)>([^<]*)</", body)))
        if answer is None:
            self._reply(500, ENVELOPE.format(CONFLICT))
        else:
            response = f'<u:{action}Response xmlns:u="{SERVICE}">{answer}</u:{action}Response>'
            self._reply(200, ENVELOPE.format(response))

    def _reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Not to stderr."""


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    server = FakeRouter()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def mapper_for(router: FakeRouter) -> PortMapper:
    def find() -> Any:
        import miniupnpc

        upnp = miniupnpc.UPnP()
        upnp.selectigd(router.url)  # instead of a search, which would go out to the real network
        return upnp

    return PortMapper(Random(1), find)


async def test_a_real_exchange_maps_a_port_to_this_machine_and_takes_it_back(router: FakeRouter):
    mapper = mapper_for(router)
    assert await mapper.map(4001) == MappedPort(4001, 4001)
    mapping = router.mappings[4001]
    assert mapping["NewInternalPort"] == "4001"
    assert mapping["NewInternalClient"] == "127.0.0.1"
    assert mapping["NewProtocol"] == "TCP"
    assert mapping["NewLeaseDuration"] == str(LEASE_S)
    await mapper.unmap()
    assert router.mappings == {}


async def test_a_port_that_the_router_gave_to_another_machine_is_left_to_it(router: FakeRouter):
    router.taken = {4001}
    mapped = await mapper_for(router).map(4001)
    assert mapped is not None
    assert mapped.external != 4001
    assert list(router.mappings) == [mapped.external]
