"""Headless Chromium, where there is one: open a page, act on it, and read what became of it."""

import html
import json
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)


def act(page, script, tmp_path, size=(1200, 900), dark=False):
    """Open a copy of `page`, a file, and do as :func:`read` says."""
    probe = tmp_path / "probe.html"
    probe.write_text(probed(page.read_text(encoding="utf-8"), script), encoding="utf-8")
    return read(probe.as_uri(), tmp_path, size, dark)


def probed(text, script):
    """A page in which `script`, the body of an async function, runs last; what it returns is written into the page."""
    catch = "<script>window.seen = []; addEventListener('error', e => seen.push(e.message));</script>"
    run = (
        f"<script>addEventListener('load', async () => {{ const found = await (async () => {{ {script} }})();"
        "const out = document.createElement('pre'); out.id = 'found';"
        "out.textContent = JSON.stringify({...found, errors: seen}); document.body.append(out); });</script>"
    )
    return text.replace("<head>", "<head>" + catch, 1).replace("</body>", run + "</body>")


def read(address, tmp_path, size=(1200, 900), dark=False):
    """Open a probed page; gives what its script returned, and under "errors" what went wrong on the page."""
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += [f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=8000", "--dump-dom"]
    words += ["--blink-settings=preferredColorScheme=0"] if dark else []
    dom = subprocess.run([*words, address], capture_output=True, text=True, timeout=120, check=True).stdout
    found = dom.rpartition('<pre id="found">')[2].partition("</pre>")[0]
    return json.loads(html.unescape(found))
