"""The controls of the live page, the URL that holds them, and what can be done with a picture, in a real browser."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, WebSocketRoute, expect

from tests.web.conftest import OpenPage
from tests.web.pages import (
    PROMPT,
    FakeServer,
    assert_same_picture,
    copied,
    downloaded,
    error,
    is_kept,
    picture,
    shows_color,
    shows_final,
    shows_refined,
)

pytestmark = pytest.mark.xdist_group("service")
LIST = re.compile("/v1/models$")
STATE = "#prompt=a+red+apple+on+a+blue+background&seed=7&steps=5&guidance=1.5&negative=a+leaf&scheduler=ddim"


class Service:
    """The real service's list of models, changed, and a socket that draws at once."""

    def __init__(self, service_url: str, **changes: Any) -> None:
        self.models: dict[str, Any] = httpx.get(f"{service_url}/v1/models").json()
        self.models["data"] = [card for card in self.models["data"] if card["id"] == "mini-lcm"]
        self.models["data"][0] |= changes
        self.socket = FakeServer(lambda _, message, socket: socket.send(picture(message["seq"], 1, "lime")))

    def add(self, name: str, **changes: Any) -> None:
        self.models["data"].append(self.models["data"][0] | {"id": name} | changes)

    def add_loading(self, name: str) -> None:
        self.add(name, ready=False, state="loading")

    def finish_loading(self) -> None:
        for card in self.models["data"]:
            if card["state"] == "loading":
                card |= {"ready": True, "state": "warm"}

    def restart(self, change: Callable[[], object]) -> None:
        """As soon as something is asked for: by then there is a `change`."""

        def answer(connection: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
            if connection == 1:
                change()
                socket.close(code=1012, reason="{}")
            else:
                socket.send(picture(message["seq"], 1, "lime"))

        self.socket.answer = answer

    def prepare(self, page: Page) -> None:
        page.route(LIST, self.answer)
        self.socket.prepare(page)

    def answer(self, route: Route) -> None:
        route.fulfill(json=self.models)

    @property
    def newest(self) -> dict[str, Any]:
        return self.socket.requests[-1]


# Limits


def test_the_controls_have_the_models_limits_and_defaults(open_page: OpenPage, service_url: str) -> None:
    card = httpx.get(f"{service_url}/v1/models/mini-lcm").json()
    page = open_page()
    for control, field in (("Steps", "num_inference_steps"), ("Guidance", "guidance_scale")):
        slider = page.get_by_label(control, exact=True)
        found = [slider.get_attribute(name) for name in ("min", "max")] + [slider.input_value()]
        assert [float(value or "") for value in found] == [card[field][name] for name in ("min", "max", "default")]
    assert page.locator("#scheduler option").all_inner_texts() == card["schedulers"]
    expect(page.get_by_label("Scheduler")).to_have_value(card["default_scheduler"])
    expect(page.get_by_label("Size")).to_have_value(card["default_size"])


def test_another_model_brings_its_own_limits(open_page: OpenPage, service_url: str) -> None:
    service = Service(service_url)
    sizes = {"sizes": ["32x64", "64x32"], "default_size": "32x64"}
    steps = {"num_inference_steps": {"default": 1, "min": 1, "max": 2}}
    service.add("other", **sizes, **steps, max_num_images=4, schedulers=["only"], default_scheduler="only")
    page = open_page(service.prepare, state="#steps=20&grid=3")
    page.get_by_label("Model").select_option("other")
    page.locator("#prompt").fill("tree")
    shows_final(page, "tree")
    expected = {"model": "other", "width": 32, "height": 64, "scheduler": "only", "num_inference_steps": 1}
    assert expected.items() <= service.newest.items()
    assert "num_images" not in service.newest, "nine are too many for it"
    expect(page.get_by_label("3 × 3")).to_be_disabled()
    expect(page.get_by_label("Scheduler")).to_be_hidden()


def test_a_model_without_a_worker_cannot_be_chosen_and_a_link_to_it_says_so(
    open_page: OpenPage, service_url: str
) -> None:
    service = Service(service_url)
    service.add("cold", ready=False)
    page = open_page(service.prepare, state="#model=cold&prompt=tree")
    expect(page.locator("#message")).to_contain_text("No worker has cold loaded right now")
    expect(page.locator("#model option[value=cold]")).to_be_disabled()
    assert service.socket.requests == []
    service.models["data"][1]["ready"] = True
    shows_final(page, "tree")
    expect(page.locator("#message")).to_have_text("")
    assert service.newest["model"] == "cold"


def test_values_of_a_link_stay_within_the_limits(open_page: OpenPage, service_url: str) -> None:
    service = Service(service_url)
    page = open_page(service.prepare, state="#prompt=tree&steps=500&scheduler=none&model=mini-lcm")
    shows_final(page, "tree")
    expect(page.locator("#message")).to_contain_text("steps 500 became 20")
    expect(page.locator("#message")).to_contain_text("there is no scheduler none")
    assert service.newest["refine"]["num_inference_steps"] == 20


def test_a_grid_that_is_too_large_for_the_model_becomes_one_picture(open_page: OpenPage, service_url: str) -> None:
    service = Service(service_url, max_num_images=4)
    page = open_page(service.prepare, state="#prompt=tree&grid=3")
    shows_final(page, "tree")
    expect(page.locator("#message")).to_have_text("Not as in the link: 9 pictures became one.")
    assert "num_images" not in service.newest


def test_a_model_that_is_gone_after_a_restart_gives_way_to_one_that_is_there(
    open_page: OpenPage, service_url: str
) -> None:
    service = Service(service_url)
    service.add("other")

    def answer(connection: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        if connection == 1:
            del service.models["data"][1]
            socket.close(code=1012, reason="{}")
        elif message["model"] == "other":
            socket.send(error(message["seq"], "model_not_found", "model: there is no other"))
        else:
            socket.send(picture(message["seq"], 1, "lime"))

    service.socket.answer = answer
    page = open_page(service.prepare, state="#model=other")
    page.locator("#prompt").fill("tree")
    shows_final(page, "tree")
    expect(page.locator("#message")).to_have_text("There is no model other any more.")
    assert page.locator("#model option").all_inner_texts() == ["mini-lcm"]
    assert service.newest["model"] == "mini-lcm"


def test_a_model_that_was_there_all_along_keeps_its_settings_after_a_reconnect(
    open_page: OpenPage, service_url: str
) -> None:
    service = Service(service_url)
    service.restart(lambda: service.add("newcomer"))
    page = open_page(service.prepare, state="#steps=7&prompt=tree")
    shows_final(page, "tree")
    expect(page.locator("#model option")).to_have_count(2)
    expect(page.get_by_label("Steps")).to_have_value("7")
    expect(page.get_by_label("Model")).to_have_value("mini-lcm")


def test_a_model_that_becomes_ready_later_can_be_chosen_then(open_page: OpenPage, service_url: str) -> None:
    service = Service(service_url)
    service.add_loading("late")
    page = open_page(service.prepare, state="#prompt=tree")
    shows_final(page, "tree")
    options = page.locator("#model option")
    expect(options).to_have_text(["mini-lcm", "late (loading)"])
    service.finish_loading()
    expect(options).to_have_text(["mini-lcm", "late"])
    assert len(service.socket.requests) == 1, "what is drawn already is not asked for again"
    page.get_by_label("Model").select_option("late")
    shows_final(page, "tree")
    assert service.newest["model"] == "late"


def test_a_choice_made_while_the_list_is_on_its_way_stays(open_page: OpenPage, service_url: str) -> None:
    service = Service(service_url)
    service.add_loading("late")
    service.add("other")
    page = open_page(service.prepare, state="#prompt=tree")
    shows_final(page, "tree")
    held: list[Route] = []
    page.route(LIST, lambda route: held.append(route), times=1)
    with page.expect_request(LIST):
        pass
    page.get_by_label("Model").select_option("other")
    service.finish_loading()
    service.answer(held[0])
    expect(page.locator("#model option")).to_have_text(["mini-lcm", "late", "other"])
    expect(page.get_by_label("Model")).to_have_value("other")


def test_a_list_that_did_not_come_is_asked_for_again(open_page: OpenPage, service_url: str) -> None:
    service = Service(service_url)
    service.add_loading("late")
    page = open_page(service.prepare, state="#prompt=tree")
    shows_final(page, "tree")
    broken = "broken off"
    page.route(LIST, lambda route: route.fulfill(body=broken), times=1)
    with page.expect_response(lambda response: bool(LIST.search(response.url)) and response.text() == broken):
        pass
    service.finish_loading()
    expect(page.locator("#model option")).to_have_text(["mini-lcm", "late"])


def test_a_link_to_a_model_that_is_being_loaded_waits_for_it(open_page: OpenPage, service_url: str) -> None:
    service = Service(service_url)
    service.add_loading("late")
    page = open_page(service.prepare, state="#model=late&prompt=tree")
    expect(page.locator("#message")).to_have_text("late is being loaded. Drawing begins as soon as it is ready.")
    service.finish_loading()
    shows_final(page, "tree")
    assert service.newest["model"] == "late"


def test_a_model_that_came_back_with_other_limits_brings_them(open_page: OpenPage, service_url: str) -> None:
    service = Service(service_url)
    steps = {"default": 2, "min": 1, "max": 3}
    service.restart(lambda: service.models["data"][0].update(num_inference_steps=steps))
    page = open_page(service.prepare, state="#steps=7&prompt=tree")
    shows_final(page, "tree")
    slider = page.get_by_label("Steps")
    expect(slider).to_have_attribute("max", "3")
    expect(slider).to_have_value("3")
    expect(page.locator("#message")).to_contain_text("mini-lcm has other limits now")


def test_a_negative_prompt_waits_for_a_guidance_that_makes_it_count(open_page: OpenPage, service_url: str) -> None:
    service = Service(service_url)
    page = open_page(service.prepare)
    negative = page.get_by_label("Not in the picture")
    expect(negative).to_be_disabled()
    expect(negative).to_have_accessible_description("It counts with a guidance above 1 only.")
    page.get_by_label("Guidance").fill("1.5")
    expect(negative).to_be_enabled()
    negative.fill("leaves")
    page.locator("#prompt").fill("tree")
    shows_final(page, "tree")
    assert (service.newest["negative_prompt"], service.newest["guidance_scale"]) == ("leaves", 1.5)
    page.get_by_label("Guidance").fill("1")
    expect(negative).to_be_disabled()
    shows_final(page, "tree")
    assert "negative_prompt" not in service.newest


@pytest.mark.parametrize(("guidance", "why"), [("embedded", "reads the guidance"), ("none", "without guidance")])
def test_models_that_know_no_negative_prompt_say_so(
    open_page: OpenPage, service_url: str, guidance: str, why: str
) -> None:
    page = open_page(Service(service_url, guidance=guidance).prepare, state="#guidance=2")
    expect(page.get_by_label("Not in the picture")).to_be_disabled()
    expect(page.locator("#negative-why")).to_contain_text(why)


def test_styles_are_sent_with_their_weights_and_stand_in_the_link(open_page: OpenPage, service_url: str) -> None:
    weight = {"default": 1.0, "min": 0.0, "max": 1.5}
    lora = {"name": "pixel", "description": "Pixel art", "trigger": "pixel style", "weight": weight, "license": "MIT"}
    service = Service(service_url, loras=[lora, lora | {"name": "ink"}])
    page = open_page(service.prepare)
    page.get_by_label("pixel", exact=True).check()
    expect(page.get_by_label("pixel", exact=True)).to_have_accessible_description("Pixel art. Say “pixel style”. MIT")
    page.get_by_label("Weight of pixel").fill("0.8")
    page.locator("#prompt").fill("tree")
    shows_final(page, "tree")
    assert service.newest["loras"] == [{"name": "pixel", "weight": 0.8}]
    page.wait_for_url(re.compile("lora=pixel%3A0.8"))
    other = open_page(service.prepare, state=page.url.partition("/#")[2].join(["#", ""]))
    shows_final(other, "tree")
    assert service.newest["loras"] == [{"name": "pixel", "weight": 0.8}]


def test_an_open_lock_draws_every_picture_with_another_seed(open_page: OpenPage, service_url: str) -> None:
    service = Service(service_url)
    page = open_page(service.prepare)
    page.keyboard.type("ab")
    page.get_by_role("button", name="Keep this seed").click()
    page.locator("#prompt").focus()
    page.keyboard.type("cd")
    shows_final(page, "abcd")
    seeds = [request["seed"] for request in service.socket.requests]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


# The URL


def test_a_shared_link_gives_the_same_picture(open_page: OpenPage) -> None:
    page = open_page(state=STATE)
    shows_refined(page, PROMPT)
    link = copied(page, "link")
    other = open_page(state="#" + link.partition("#")[2])
    shows_refined(other, PROMPT)
    assert_same_picture(downloaded(page)[1], downloaded(other)[1])
    values = [
        other.locator(f"#{name}").input_value() for name in ("seed", "steps", "guidance", "negative", "scheduler")
    ]
    assert values == ["7", "5", "1.5", "a leaf", "ddim"]


def test_the_words_are_in_the_part_of_the_url_that_no_server_sees(open_page: OpenPage) -> None:
    asked: list[str] = []
    page = open_page(lambda page: page.on("request", lambda request: asked.append(request.url)), state=STATE)
    shows_refined(page, PROMPT)
    assert not [url for url in asked if "apple" in url.partition("#")[0]]


def test_another_link_in_the_same_tab_is_followed(open_page: OpenPage) -> None:
    page = open_page(state=STATE)
    shows_refined(page, PROMPT)
    page.evaluate("location.hash = '#prompt=a+red+heart+on+a+white+background&seed=3'")
    shows_refined(page, "a red heart on a white background")
    expect(page.locator("#seed")).to_have_value("3")


def test_another_link_in_the_same_tab_changes_all_that_it_does_not_name(open_page: OpenPage, service_url: str) -> None:
    weight = {"default": 1.0, "min": 0.0, "max": 1.5}
    service = Service(service_url, loras=[{"name": "ink", "description": "", "weight": weight}])
    state = "#prompt=tree&negative=leaf&guidance=1.5&steps=7&grid=2&refine=0&format=webp&lora=ink:0.5&seed=5"
    page = open_page(service.prepare, state=state)
    expect(page.locator("#stage")).to_have_attribute("data-seq", "1")
    page.evaluate("location.hash = '#prompt=sun&seed=5'")
    shows_final(page, "sun")
    fresh = open_page(service.prepare, state="#prompt=sun&seed=5")
    shows_final(fresh, "sun")
    first, linked, anew = service.socket.requests
    assert {"loras", "num_images", "negative_prompt"} <= set(first)
    assert linked | {"seq": 0, "connection": 0} == anew | {"seq": 0, "connection": 0}


def test_a_link_to_a_model_that_is_gone_says_so_in_the_same_tab_too(open_page: OpenPage, service_url: str) -> None:
    page = open_page(Service(service_url).prepare)
    page.evaluate("location.hash = '#prompt=sun&model=gone&steps=99'")
    shows_final(page, "sun")
    words = "Not as in the link: there is no model gone, steps 99 became 20."
    expect(page.locator("#message")).to_have_text(words)


# The strip, and what can be done with a picture


def test_a_picture_of_before_comes_back_with_its_words_and_seed(open_page: OpenPage) -> None:
    page = open_page(state=STATE)
    shows_refined(page, PROMPT)
    first = downloaded(page)
    is_kept(page, 1)
    page.locator("#prompt").fill("a panda on a yellow background")
    page.get_by_role("button", name="New seed").click()
    shows_refined(page, "a panda on a yellow background")
    is_kept(page, 2)
    page.get_by_role("button", name=f"Back to {PROMPT}, seed 7").click()
    shows_final(page, PROMPT)
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    expect(page.locator("#seed")).to_have_value("7")
    assert downloaded(page) == first


def test_of_two_pictures_of_before_the_one_chosen_last_is_shown(open_page: OpenPage, service_url: str) -> None:
    colors = {"one": "red", "two": "blue"}
    service = Service(service_url)
    service.socket.answer = lambda _, message, socket: socket.send(
        picture(message["seq"], 1, colors[message["prompt"]])
    )
    page = open_page(service.prepare, state="#refine=0")
    for count, words in enumerate(colors, start=1):
        page.locator("#prompt").fill(words)
        is_kept(page, count)
    page.evaluate(
        """() => {
          const decode = window.createImageBitmap;
          let calls = 0;
          const later = (image) => new Promise((resolve) => setTimeout(() => resolve(decode(image)), 400));
          window.createImageBitmap = (image) => (calls++ ? decode(image) : later(image));
        }"""
    )
    page.get_by_role("button", name="Back to one").click()
    page.get_by_role("button", name="Back to two").click()
    page.wait_for_timeout(700)
    shows_final(page, "two")
    shows_color(page, [0, 0, 255])
    assert page.evaluate("seen.bitmaps") == 1


def test_the_strip_is_one_stop_that_arrows_walk_along(open_page: OpenPage, service_url: str) -> None:
    page = open_page(Service(service_url).prepare, state="#refine=0")
    for count, words in enumerate(("one", "two", "three"), start=1):
        page.locator("#prompt").fill(words)
        is_kept(page, count)
    page.locator("#strip button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#strip button").nth(2)).to_be_focused()
    assert page.locator("#strip button").evaluate_all("(all) => all.map((one) => one.tabIndex)") == [-1, -1, 0]
    page.keyboard.press("Enter")
    shows_final(page, "one")


@pytest.mark.parametrize(("choice", "ending", "format"), [("webp", "webp", "WEBP"), ("jpeg", "jpg", "JPEG")])
def test_a_download_has_the_chosen_format(open_page: OpenPage, choice: str, ending: str, format: str) -> None:
    page = open_page(state=STATE)
    shows_refined(page, PROMPT)
    is_kept(page, 1)
    page.get_by_label("File").select_option(choice)
    expect(page.locator("#stage")).to_have_attribute("data-seq", "2")
    shows_refined(page, PROMPT)
    name, data = downloaded(page)
    assert (name.rpartition(".")[2], Image.open(io.BytesIO(data)).format) == (ending, format)
    page.locator("#strip button").last.click()
    name, data = downloaded(page)
    assert (name.rpartition(".")[2], Image.open(io.BytesIO(data)).format) == (ending, format)


def test_the_copied_curl_command_draws_the_same_picture(open_page: OpenPage, tmp_path: Path) -> None:
    words = 'a red apple, it\'s on a "blue" background'
    page = open_page(state="#seed=7&steps=5&guidance=1.5&negative=a+leaf")
    page.keyboard.insert_text(words)
    shows_refined(page, words)
    command = copied(page, "curl")
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    (file,) = tmp_path.iterdir()
    assert file.name == "a-red-apple-it-s-on-a-blue-background-7.png"
    assert_same_picture(file.read_bytes(), downloaded(page)[1])


def test_the_copied_python_program_draws_the_same_picture(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(state=STATE)
    shows_refined(page, PROMPT)
    program = copied(page, "python")
    assert "from openai import OpenAI" in program
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60, env=clean_environment())
    assert_same_picture((tmp_path / "a-red-apple-on-a-blue-background-7.png").read_bytes(), downloaded(page)[1])


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}


def test_the_copied_javascript_draws_the_same_picture(open_page: OpenPage, service_url: str) -> None:
    page = open_page(state=STATE)
    shows_refined(page, PROMPT)
    script = copied(page, "javascript")
    other = page.context.new_page()
    other.goto(f"{service_url}/livez")
    other.evaluate(f"() => {{ {script} }}")
    other.wait_for_selector("img")
    data = other.evaluate(
        "async () => [...new Uint8Array(await (await fetch(document.querySelector('img').src)).arrayBuffer())]"
    )
    assert_same_picture(bytes(data), downloaded(page)[1])


def test_what_is_copied_never_holds_a_key(open_page: OpenPage) -> None:
    page = open_page()
    texts = page.evaluate(
        """async () => {
          const { asCurl, asPython, asJavaScript } = await import("/static/copy.js");
          const place = { origin: "https://a.example", hasKeys: true, name: "a" };
          return [asCurl, asPython, asJavaScript].map((write) => write({ prompt: "a" }, place));
        }"""
    )
    assert "$FEWSTEP_API_KEY" in texts[0]
    assert 'os.environ["FEWSTEP_API_KEY"]' in texts[1]
    assert "fewstep.auth." in texts[2]
    assert "wss://a.example/v1/live" in texts[2]


def test_the_copied_javascript_does_not_end_the_script_of_the_page_that_it_stands_in(open_page: OpenPage) -> None:
    program = open_page().evaluate(
        """async () => {
          const { asJavaScript } = await import("/static/copy.js");
          return asJavaScript({ prompt: "</script><b>" }, { origin: "https://a.example", hasKeys: false });
        }"""
    )
    assert "<" not in program
    assert r'"\u003c/script>\u003cb>"' in program


def test_the_url_gives_back_what_went_into_it(open_page: OpenPage) -> None:
    wish = {
        "prompt": "ä & b=c #d", "negative": "e+f", "model": "m", "size": "64x64", "steps": 4, "guidance": 0.5,
        "seed": 2**53 - 1, "scheduler": "lcm", "loras": [{"name": "a:b", "weight": 0.5}], "grid": 3, "refine": False,
        "format": "webp",
    }  # fmt: skip
    script = """async (wish) => {
      const { readUrl, urlOf } = await import("/static/url.js");
      return JSON.stringify(readUrl(urlOf(wish)));
    }"""
    assert json.loads(open_page().evaluate(script, wish)) == wish
