"""Why no GPU can be used, as the system shows it."""

import stat

import torch

from minibooth.device import no_gpu


def test_the_reason_is_what_the_system_shows(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if not no_gpu.visible_card():  # as /proc has it
        assert no_gpu.why().startswith("the system shows no NVIDIA card")
    tool.write_text("#!/bin/sh\necho NVIDIA GeForce RTX 4070\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    for cuda, said in ((None, "is built without CUDA: get the one"), ("12.8", "driver is too old")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert no_gpu.why().startswith("there is NVIDIA GeForce RTX 4070, but ")
        assert said in no_gpu.why()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is '': unset it" in no_gpu.why()
