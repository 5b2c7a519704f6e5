"""What the tests of this folder share."""

import warnings

import huggingface_hub
import peers
import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any use of the hub that a test does not expect is a failure, not a wait."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for {args} {kwargs}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def other_vae():
    return peers.pipeline("sd1", seed=5).vae
