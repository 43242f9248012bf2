"""Notebooks in JupyterLab, in Chromium (`--browser`); `-s` prints where pictures lie."""

import json
import os
import re
import shutil
import subprocess
import sys

import papermill
import pytest
from running import NOTEBOOKS, ROOT
from test_notebooks import BLOCKDROP, INFERENCE, SOLE

MINUTE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def chromium(request):
    if not request.config.getoption("--browser"):
        pytest.skip("needs Chromium: pytest --browser")
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium on the path")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(chromium, tmp_path_factory):
    """The project, its notebooks with small settings and without outputs."""
    folder = tmp_path_factory.mktemp("lab") / "project"
    shutil.copytree(ROOT / "models", folder / "models")
    shutil.copy(ROOT / "utils.py", folder)
    for name, settings in zip(NOTEBOOKS, (SOLE, BLOCKDROP, INFERENCE), strict=True):
        file = f"{name}.ipynb"
        papermill.execute_notebook(ROOT / file, folder / file, parameters=settings, prepare_only=True)
    return folder


@pytest.fixture(scope="module")
def lab(folder):
    """The address of a running JupyterLab."""
    preferences = folder.parent / "preferences"
    for extension, settings in (
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
        # Otherwise only the cells in sight would be in the page.
        ("notebook-extension/tracker", {"windowingMode": "none"}),
    ):
        path = preferences / "@jupyterlab" / f"{extension}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0",
         "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"],
        env=os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(preferences)},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    for line in server.stderr:
        if found := re.search(r"http://(?:localhost|127\.0\.0\.1):\d+", line):
            break
    yield found[0]
    server.terminate()
    server.communicate()


def test_run_all(lab, chromium, folder):
    """Every notebook, by the menu's Run All: no error, no warning, bars and sliders drawn."""
    for name in NOTEBOOKS:
        page = chromium.new_page(viewport={"width": 1200, "height": 16_000})  # all of the notebook
        page.goto(f"{lab}/lab/tree/{name}.ipynb?reset")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=MINUTE)
        page.get_by_text("| Idle", exact=False).first.wait_for(timeout=MINUTE)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        cells = page.locator(".jp-CodeCell")
        last = cells.last.locator(".jp-InputPrompt").filter(has_text=f"[{cells.count()}]")
        last.wait_for(timeout=5 * MINUTE)
        page.wait_for_timeout(2000)  # the last widgets are drawn
        output = page.locator(".jp-OutputArea-output")
        for wrong in ("application/vnd.jupyter.error", "application/vnd.jupyter.stderr"):
            assert page.locator(f'[data-mime-type="{wrong}"]').all_text_contents() == [], name
        assert "Warning" not in " ".join(output.all_text_contents()), name
        assert page.locator(".jp-OutputArea-output img").count() > 0, name
        if name != "blockdrop_inference":
            assert page.locator(".widget-hprogress, .progress").count() > 0
        else:
            assert page.locator(".widget-slider").count() == 1
            box = page.locator(".widget-text input")
            box.fill("none.png")
            box.press("Enter")
            page.get_by_text("there is no image file none.png").wait_for(timeout=MINUTE)
        picture = folder.parent / f"{name}.png"
        page.screenshot(path=picture)
        print(picture)
        page.close()
