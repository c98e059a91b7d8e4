"""The stage `doctor`: what this machine is, how fast it is at medcl's work, and what to change."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from medcl.config import DoctorConfig

PACKAGES = ("medcl", "torch", "monai", "pytorch-lightning", "numpy", "blosc2", "nibabel", "SimpleITK", "pydicom")
SIDE, CROP, CROPS = 128, 64, 20  # voxels of a volume written and read to time the disk, of a crop, and how many
SLOW_READS = 100.0  # crops a second: below it reads cannot hide behind a step
LITTLE_DISK = 20.0  # GB
ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")
STEPS = 3
BATCH, PATCH = 2, 48


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Looks at versions, devices, threads, allocator and disk, and times a step.

    Returns:
        What was found, under the names that `--json` prints; `advice` is a list of lines.
    """
    facts: dict[str, Any] = {
        "versions": versions(),
        "devices": devices(),
        "threads": threads(),
        "allocator": allocator(),
    }
    facts["store"] = store_speed(config.store)
    if not config.quick:
        facts["step"] = step_speed()
    facts["advice"] = advice(facts)
    return facts


def versions() -> dict[str, str]:
    """Versions of Python, the system, medcl and the packages it stands on."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "from source" if name == "medcl" else "missing"
    return found


def devices() -> dict[str, Any]:
    """Cores, memory in GB, and every GPU that torch sees, with its memory."""
    import torch

    found: dict[str, Any] = {
        "cores": _cores(),
        "memory_gb": _memory_gb(),
        "cpu_bf16": bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
        "gpus": [],
        "nvidia_seen": shutil.which("nvidia-smi") is not None,
        "cuda_build": torch.version.cuda,
    }
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found["gpus"].append({"name": card.name, "memory_gb": round(total / 1e9, 1), "free_gb": round(free / 1e9, 1),
                              "bf16": torch.cuda.is_bf16_supported()})  # fmt: skip
    return found


def threads() -> dict[str, Any]:
    """Threads of torch, the variables that govern them, and the machine's load."""
    import torch

    return {
        "torch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def allocator() -> dict[str, Any]:
    """Which `malloc` serves this process, and glibc's huge pages."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        maps = os.environ.get("LD_PRELOAD", "")
    loaded = next((name for name in ALLOCATORS if f"lib{name}" in maps), "")
    return {
        "name": loaded or ("glibc" if platform.libc_ver()[0] == "glibc" else "the system's"),
        "library": _find_tcmalloc(),
        "hugetlb": "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""),
    }


def store_speed(store: str) -> dict[str, Any]:
    """Writes a volume to the store's disk and reads crops of it; leaves nothing behind.

    Raises:
        MedclError: the store cannot be written.
    """
    import numpy as np

    from medcl.store.volumes import StoredVolume, store_folder, write_volume

    root = store_folder(store)
    rng = np.random.default_rng(0)
    volume = np.repeat(rng.standard_normal((SIDE // 4, SIDE, SIDE), dtype=np.float32), 4, axis=0)
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=root))
    try:
        began = time.perf_counter()
        write_volume(folder / "a", volume, None, {"case": "a", "foreground": {}})
        written = time.perf_counter() - began
        read = StoredVolume(folder / "a")
        began = time.perf_counter()
        for _ in range(CROPS):
            read.half(rng.integers(0, SIDE - CROP, 3).tolist(), (CROP,) * 3)
        spent = time.perf_counter() - began
        size = (folder / "a" / "image.b2nd").stat().st_size
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(root).free / 1e9
    return {"path": str(root), "free_gb": round(free, 1), "write_mb_s": round(size / 1e6 / written, 1),
            "crops_s": round(CROPS / spent, 1)}  # fmt: skip


def step_speed() -> dict[str, Any]:
    """Seconds of a training step of the default network, in the precision that training would take."""
    import torch

    from medcl.networks.backbones import BackboneSpec, build_backbone
    from medcl.runtime.memory import keep_memory
    from medcl.runtime.precision import autocast, choose_precision
    from medcl.runtime.training import choose_accelerator

    keep_memory()
    accelerator = choose_accelerator("auto")
    precision = choose_precision("auto", accelerator)
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    network = build_backbone(BackboneSpec()).to(device)
    optimizer = torch.optim.AdamW(network.parameters())
    image = torch.randn(BATCH, 1, PATCH, PATCH, PATCH, device=device)
    spent = []
    for _ in range(STEPS):
        began = time.perf_counter()
        optimizer.zero_grad()
        with autocast(precision, accelerator):
            loss = network(image).float().square().mean()
        loss.backward()
        optimizer.step()
        float(loss.detach())
        spent.append(time.perf_counter() - began)
    return {"what": f"unet, batch {BATCH} of {PATCH}³", "accelerator": accelerator, "precision": precision,
            "seconds": round(min(spent), 4)}  # fmt: skip


def advice(facts: dict[str, Any]) -> list[str]:
    """What to change, most important first; empty where nothing is wrong."""
    lines = []
    gpus, store, thread, malloc = (facts["devices"]["gpus"], facts["store"], facts["threads"], facts["allocator"])
    missing = [name for name, found in facts["versions"].items() if found == "missing"]
    if missing:
        lines.append(f"Missing packages: {', '.join(missing)}. Install them: pip install {' '.join(missing)}.")
    if not gpus and facts["devices"]["nvidia_seen"]:
        build = facts["devices"]["cuda_build"]
        why = "torch is a CPU build: install a CUDA build" if not build else "torch sees none: mend driver and CUDA"
        lines.append(f"There is an NVIDIA GPU, and {why}.")
    if not gpus:
        if thread["OMP_WAIT_POLICY"].upper() != "PASSIVE":
            why = "where waiting threads spin, one busy neighbour makes training many times slower"
            lines.append(f"Set OMP_WAIT_POLICY=PASSIVE: {why}.")
        if malloc["name"] == "glibc":
            where = malloc["library"]
            how = (
                f"start with LD_PRELOAD={where}"
                if where
                else "install it (package libtcmalloc-minimal4) and preload it"
            )
            lines.append(f"A caching allocator shortens steps by a fifth to a half on a CPU: {how}.")
            if not malloc["hugetlb"] and not where:
                lines.append("Or start with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which gets part of that.")
        cores = facts["devices"]["cores"]
        if thread["torch"] < cores:
            lines.append(
                f"torch uses {thread['torch']} of {cores} cores: unset OMP_NUM_THREADS, unless others need them."
            )
        if thread["load"] is not None and thread["load"] > cores:
            lines.append(f"The machine is busy (load {thread['load']} on {cores} cores): timings here are too long.")
    for gpu in gpus:
        if gpu["free_gb"] < 0.5 * gpu["memory_gb"]:
            lines.append(f"{gpu['name']} has {gpu['free_gb']} of {gpu['memory_gb']} GB free: end what else runs on it.")
    if store["free_gb"] < LITTLE_DISK:
        lines.append(f"{store['free_gb']} GB are free for the store: set MEDCL_STORE, or --store, to a larger disk.")
    if store["crops_s"] < SLOW_READS:
        lines.append(f"{store['crops_s']} crops a second are few: put the store on a local disk.")
    return lines


def describe(facts: dict[str, Any]) -> str:
    """The findings in plain lines."""
    device, thread, malloc, store = (facts[name] for name in ("devices", "threads", "allocator", "store"))
    cards = [f"{gpu['name']}, {gpu['free_gb']} of {gpu['memory_gb']} GB free" for gpu in device["gpus"]]
    policy = thread["OMP_WAIT_POLICY"] or "not set"
    lines = [
        "Versions    " + ", ".join(f"{name} {found}" for name, found in facts["versions"].items()),
        f"Devices     {device['cores']} cores, {device['memory_gb']} GB; "
        + ("; ".join(cards) or "no GPU")
        + ("; the CPU multiplies in bf16" if device["cpu_bf16"] else ""),
        f"Threads     torch {thread['torch']}, OMP_WAIT_POLICY {policy}, load {thread['load']}",
        f"Allocator   {malloc['name']}" + (", huge pages" if malloc["hugetlb"] else ""),
        f"Store       {store['path']}: {store['free_gb']} GB free, writes {store['write_mb_s']} MB/s, "
        f"reads {store['crops_s']} crops of {CROP}³ a second",
    ]
    if "step" in facts:
        step = facts["step"]
        lines.append(
            f"Step        {step['seconds']:.3g} s ({step['what']}, {step['accelerator']}, {step['precision']})"
        )
    lines += ["", *(["What to change:", *(f"  - {line}" for line in facts["advice"])] if facts["advice"]
                    else ["Nothing to change."])]  # fmt: skip
    return "\n".join(lines)


def report(config: DoctorConfig) -> None:
    """Prints the findings, as JSON where asked for."""
    facts = doctor(config)
    print(json.dumps(facts, indent=1) if config.json else describe(facts))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _find_tcmalloc() -> str:
    for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"):
        found = sorted(Path(folder).glob("libtcmalloc_minimal.so*"))
        if found:
            return str(found[0])
    return ""
