"""Make the pictures in ``docs/images`` from the pages of three models: ``python docs/pictures.py`` (playwright, chromium)."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchvision
from playwright.sync_api import sync_playwright

import ssprop_fx
from ssprop_fx import Policy, Report

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def resnet50() -> Report:
    """In eager mode, the stem dense, pointwise convolutions at half the rate."""
    rules = [{"layers": "conv1", "drop_rate": 0}, {"kind": "pointwise", "drop_rate": 0.5}]
    policy = Policy(drop_rate=0.8, schedule={"kind": "bar", "period": 4, "warmup": 2}, rules=rules)
    model = ssprop_fx.transform(torchvision.models.resnet50(weights=None), policy)
    return ssprop_fx.inspect(model, torch.randn(2, 3, 64, 64)).at(5)


def from_suite(name: str, compiled: bool) -> Report:
    """A model of the development suite, in eager mode or through the backend after a period of its schedule."""
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo

    (entry,) = (m for m in zoo.DEVELOPMENT if m.name == name)
    policy = Policy(drop_rate=0.8, schedule={"kind": "linear", "period": 6, "warmup": 2, "levels": 3})
    net, arguments = entry.build(), entry.arguments()
    if not compiled:
        return ssprop_fx.inspect(ssprop_fx.transform(net, policy), arguments).at(7)
    options: Any = {"policy": policy, "inner": "aot_eager"}
    model = torch.compile(net, backend="ssprop", options=options, dynamic=False)
    for _ in range(8):
        zoo.run_step(model, arguments)
        policy.step()
    return ssprop_fx.inspect(model, arguments).at(7)


SHOTS = {  # name: (report, width, theme, layer that is opened, fold everything)
    "page-1400-light": ("resnet50", 1400, "light", "layer1.0.conv2", False),
    "page-1400-dark": ("unet", 1400, "dark", "down_blocks.0.resnets.0.conv1", False),
    "page-390-light": ("resnet50", 390, "light", None, False),
    "page-390-dark": ("resnet50", 390, "dark", "layer1.0.conv2", False),
    "page-folded": ("resnet50", 1400, "light", None, True),
    "page-retinanet": ("retinanet", 1400, "light", "backbone.fpn.layer_blocks.1.0", False),
    "page-unet-390": ("unet", 390, "light", "down_blocks.0.resnets.0.conv1", False),
}


def main() -> None:
    """Write the pictures."""
    torch.manual_seed(0)
    reports = {
        "resnet50": resnet50(),
        "unet": from_suite("UNet2DConditionModel", compiled=True),
        "retinanet": from_suite("retinanet_resnet50_fpn", compiled=False),
    }
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for name, report in reports.items():
            report.to_html(Path(folder) / f"{name}.html")
        for picture, (name, width, theme, layer, folded) in SHOTS.items():
            height = 900 if width > 500 else 844
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
            page.goto((Path(folder) / f"{name}.html").as_uri())
            page.wait_for_selector(".row")
            if folded:
                page.click("#collapse")
            if layer:
                page.fill("#search", layer)
                page.locator(".row.match").first.click()
                page.fill("#search", "")
                page.locator("#scroll").focus()
            page.wait_for_timeout(300)
            page.screenshot(path=IMAGES / f"{picture}.png")
            page.close()
        page = browser.new_page(viewport={"width": 2000, "height": 2400})
        page.goto((Path(folder) / "unet.html").as_uri())
        page.fill("#search", "down_blocks.0.resnets.0.conv1")
        page.locator(".row.match").first.click()
        box = page.locator("#detail").bounding_box()
        end = page.locator("#detail h3", has_text="Backward, factor 1").bounding_box()
        assert box
        assert end
        page.screenshot(path=IMAGES / "passes.png", clip=box | {"height": end["y"] - box["y"] - 8})
        browser.close()


if __name__ == "__main__":
    main()
