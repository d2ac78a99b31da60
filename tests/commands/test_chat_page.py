"""The chat page in a real browser, where there is one."""

import json
import shutil
import threading
import urllib.parse
from pathlib import Path

import pytest
from serving import one_device, serving  # noqa: F401 - a fixture

from jaxrlhf.commands.serve import ServeConfig

pytest.importorskip("uvicorn")
pytest.importorskip("selenium")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    pytest.skip("there is no Chromium with its driver", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "second").symlink_to(demo.lm)
    votes = str(folder / "votes.jsonl")
    names = (demo.lm, str(folder / "second"))
    with serving(ServeConfig.create(model=names, port=0, max_slots=4, max_queue=12, preferences=votes)) as running:
        yield running


@pytest.fixture
def page(server):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1100,800"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(server.url)
        Page(driver).until(lambda page: page.all("#model option"))
        yield Page(driver)
        errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert errors == []
    finally:
        driver.quit()


class Page:
    """What a person does on the page."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def all(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def until(self, condition):
        """Waits; the page may replace what a condition looks at meanwhile."""
        patient = WebDriverWait(self.driver, 120, 0.05, [StaleElementReferenceException])
        return patient.until(lambda _: condition(self))

    def button(self, text):
        return next((b for b in self.all("button") if b.text == text and b.is_displayed()), None)

    def click(self, text):
        self.until(lambda page: (button := page.button(text)) and (button.click() or True))

    def set(self, name, value):
        self.driver.execute_script(
            "const box = document.getElementById(arguments[0]); box.value = arguments[1]; box.onchange();", name, value
        )

    def ask(self, text):
        self.one("#input").send_keys(text, "\n")
        self.until(lambda page: page.one("#send").is_displayed() and page.all("#log .note"))

    def answers(self):
        return [node.get_attribute("textContent") for node in self.all("#log .words:not(.mine)")]

    def command(self, name, **options):
        self.driver.execute_cdp_cmd(name, options)


def test_a_conversation_streams_is_kept_and_is_shown_as_text(page):
    page.set("max_tokens", "8")
    evil = "<img src=x onerror=alert(1)> <b>hot</b>?"
    page.ask(evil)
    assert page.one(".mine").text == evil
    assert not page.all("#log img, #log b")
    (first,) = page.answers()
    assert first
    page.set("seed", "7")
    page.click("Regenerate")
    page.until(lambda page: page.answers() and page.answers() != [first] and page.one("#send").is_displayed())
    (again,) = page.answers()
    page.ask("and?")
    assert len(page.answers()) == 2
    page.driver.refresh()
    page.until(lambda page: page.all("#chats .name"))
    page.all("#chats .name")[0].click()
    assert page.answers()[0] == again and len(page.all(".mine")) == 2


def test_code_and_bold_are_rendered_and_nothing_else(page):
    script = """
        const node = document.createElement("div");
        render(node, arguments[0]);
        return [node.innerHTML, node.textContent];
    """
    html, text = page.driver.execute_script(script, "a `<i>` **b** <script>x</script>\n```html\n<p>1</p>\n```\nend")
    assert html == (
        "a <code>&lt;i&gt;</code> <strong>b</strong> &lt;script&gt;x&lt;/script&gt;"
        "<pre><code>&lt;p&gt;1&lt;/p&gt;</code></pre>end"
    )
    assert "<p>1</p>" in text


def test_stop_keeps_what_was_shown(page, server, demo):
    scheduler = server.models[demo.lm].scheduler
    entered, release, step = threading.Event(), threading.Event(), scheduler.batch.step

    def held_step():
        entered.set()
        release.wait(60)
        return step()

    scheduler.batch.step = held_step
    page.set("max_tokens", "8")
    try:
        page.one("#input").send_keys("What is hot?", "\n")
        assert entered.wait(60)
        page.click("Stop")
        page.until(lambda page: page.one("#send").is_displayed())
        release.set()
        page.until(lambda page: not scheduler.running)
    finally:
        release.set()
        scheduler.batch.step = step
    assert not page.all("#log .bad")


def test_a_vote_between_two_models_is_saved_and_the_chat_goes_on_with_the_winner(page, server):
    page.set("max_tokens", "8")
    page.one("#compare").click()
    page.ask("What is hot?")
    both = page.answers()
    assert len(both) == 2 and [note.text for note in page.all(".pair .note")] == ["A", "B"]
    page.click("B is better")
    page.until(lambda page: page.all("#log .good"))
    assert page.one("#log .good").text == "Vote saved"
    row = json.loads(Path(server.config.preferences).read_text(encoding="utf-8"))
    assert row["prompt"] == [{"role": "user", "content": "What is hot?"}]
    shown = {name: row[name][0]["content"] for name in ("chosen", "rejected")}
    assert {row["chosen_model"], row["rejected_model"]} == set(server.config.model)
    history = page.driver.execute_script("return history(current.messages, 2)")
    assert history[1] == {"role": "assistant", "content": shown["chosen"]}
    assert [note.text for note in page.all(".pair .note")] == [
        f"A: {row['rejected_model']}",
        f"B: {row['chosen_model']}",
    ]


def test_an_error_of_the_server_is_shown(page):
    page.set("max_tokens", "1000")
    page.ask("What is hot?")
    assert "context is 96 tokens" in page.one("#log .bad").text
    page.driver.get_log("browser")  # the browser notes the status 400


@pytest.mark.parametrize("width", [360, 1100])
def test_the_page_fits_its_window_light_and_dark_and_loads_from_nowhere_else(page, server, width):
    page.command("Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=1, mobile=width < 500)
    page.set("max_tokens", "8")
    page.one("#compare").click()
    page.ask("hot" * 20)
    colours = set()
    for scheme in ("light", "dark"):
        page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours.add(page.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert len(colours) == 2
    send = page.one("#send").rect
    assert send["x"] + send["width"] <= width
    names = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    hosts = {urllib.parse.urlparse(name).netloc for name in page.driver.execute_script(names)}
    assert hosts <= {urllib.parse.urlparse(server.url).netloc}
