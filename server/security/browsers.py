"""What a browser may not be made to do: a page of another site changes nothing here, whatever its user could."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

_WAY_OUT = "a proxy that serves pages of its own can take the headers Origin and Sec-Fetch-Site away"


def foreign_page(headers: Mapping[str, str]) -> str:
    """Why a request that changes something is not to be trusted; "" where it is.

    Browsers say which site a request comes from (`Sec-Fetch-Site`, and `Origin` with every POST); programs say
    neither. A page of this server's own origin is trusted where its address is one of a machine: a name could be
    anybody's, who lets it point here (DNS rebinding).

    Args:
        headers: The request's, names in lower case.
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is None and site is None:
        return ""
    host = headers.get("host", "").lower()
    if site is not None and site.lower() not in ("same-origin", "none"):
        return f"a page of another site ({_shown(origin or site)}) may change nothing here; {_WAY_OUT}"
    if site is None and origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        return f"a page of {_shown(origin)} may change nothing here; {_WAY_OUT}"
    if not _is_address(host):
        return f"a page may change something here by an address or localhost alone, not by {_shown(host)}; {_WAY_OUT}"
    return ""


def _is_address(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    return ascii(text[:60])
