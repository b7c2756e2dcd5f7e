"""Checks of the hub and its token."""

from __future__ import annotations

from collections.abc import Iterator

from fixer.base.text import told
from fixer.doctor.examine import Finding, Patient, State
from fixer.model.hub import uses_modelscope


def look_at_hub(patient: Patient) -> Iterator[Finding]:
    """The hub answers, unless the user wants to be offline."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", State.OK, "offline by wish (HF_HUB_OFFLINE)")
        return
    if uses_modelscope():
        yield Finding("hub", State.OK, "ModelScope by wish (SGLANG_USE_MODELSCOPE): SGLang downloads by itself")
        return
    where = told_address(constants.ENDPOINT)
    try:
        code = httpx.get(constants.ENDPOINT, timeout=8.0, follow_redirects=False).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as fault:
        yield Finding(
            "hub",
            State.WARNING,
            f"{where} cannot be reached: {told(fault)}",
            "Check the network, HTTPS_PROXY and HF_ENDPOINT; for a model that is in the cache set HF_HUB_OFFLINE=1.",
        )
        return
    if code >= 500:
        yield Finding("hub", State.WARNING, f"{where} answers with status {code}", "Try again later.")
    else:
        yield Finding("hub", State.OK, f"{where} answers")


def told_address(endpoint: str) -> str:
    """Scheme and host of an address: what else is in it may be a secret."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(endpoint)
        host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    except ValueError:
        return "HF_ENDPOINT"
    return f"{parts.scheme}://{host}" if host else "HF_ENDPOINT"


def look_at_token(patient: Patient) -> Iterator[Finding]:
    """The token, if there is one, is valid. It is never printed."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    from fixer.model.hub_answers import check_answers

    token = get_token()
    if token is None:
        yield Finding("token", State.OK, "none: public models can be read")
        return
    if constants.HF_HUB_OFFLINE:
        yield Finding("token", State.OK, "there is one; not checked, offline by wish")
        return
    check_answers()
    try:
        HfApi().whoami(token=token)
    except HfHubHTTPError as fault:
        code = getattr(fault.response, "status_code", 0)
        if code in (401, 403):
            yield Finding(
                "token",
                State.FAILURE,
                f"the hub does not accept it (status {code}), and refuses public models with it, too",
                "Set HF_TOKEN to a valid one (hub settings, Access Tokens), or unset it; `hf auth login` stores one.",
            )
        else:
            yield Finding("token", State.WARNING, f"not checked: the hub answered with status {code}")
    except Exception as fault:  # the transport's own errors, which differ by version; their texts may hold headers
        yield Finding("token", State.WARNING, f"not checked: the hub is out of reach ({type(fault).__name__})")
    else:
        yield Finding("token", State.OK, "valid")
