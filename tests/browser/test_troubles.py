"""What the page does when the server refuses, waits, asks for a key or is gone."""

from __future__ import annotations

import urllib.request

import pytest
from playwright.sync_api import Browser, Route

from tests.browser.chatting import Chatting
from tests.browser.conftest import KEY, Server

QUESTIONS = "**/v1/chat/completions"


def refuse(status: int, message: str, *, code: str = "", **headers: str) -> object:
    """A route that answers as the server refuses."""
    body = {"error": {"message": message, "type": "server_error", "param": None, "code": code}}

    def answer(route: Route) -> None:
        route.fulfill(status=status, json=body, headers=headers)

    return answer


@pytest.fixture
def refusing(chat: Chatting) -> Chatting:
    """A page whose console may say that requests were refused, with answers of two tokens."""
    chat.refusals = True
    chat.set(max_tokens=2)
    return chat


def test_a_busy_server_counts_down_and_then_lets_try_again(refusing: Chatting) -> None:
    page = refusing.page
    busy = refuse(429, "64 requests wait already.", **{"Retry-After": "2"})
    page.route(QUESTIONS, busy, times=1)
    refusing.send("What is a cup?")
    page.wait_for_selector(".trouble:visible")
    assert "64 requests wait already." in page.inner_text(".trouble")
    button = page.locator(".trouble-actions button")
    assert button.is_disabled()
    assert button.inner_text().startswith("Try again in ")
    page.wait_for_selector(".trouble-actions button:enabled")
    button.click()
    assert refusing.finished() != ""
    assert page.is_hidden(".trouble")


def test_a_server_that_is_not_ready_is_waited_for(refusing: Chatting) -> None:
    page = refusing.page
    page.route(QUESTIONS, refuse(503, "The model is being compiled."), times=1)
    page.route("**/ready", lambda route: route.fulfill(status=503, json={}), times=1)
    refusing.send("What is a cup?")
    page.wait_for_selector(".wait:has-text('The server is not ready yet')")
    assert refusing.finished() != ""
    assert len(refusing.bodies) == 2


def test_waiting_for_a_server_can_be_stopped(refusing: Chatting) -> None:
    page = refusing.page
    page.route(QUESTIONS, refuse(503, "The server is about to end."))
    page.route("**/ready", lambda route: route.fulfill(status=503, json={}))
    refusing.send("What is a cup?")
    page.wait_for_selector(".wait:has-text('The server is not ready yet')")
    page.keyboard.press("Escape")
    refusing.finished()
    assert page.inner_text(".remark") == "Stopped."


def test_a_refused_request_shows_the_servers_own_words_and_can_be_edited(
    refusing: Chatting,
) -> None:
    page = refusing.page
    # What the server itself says to a temperature out of its range; the page would not send it.
    page.route(
        QUESTIONS,
        lambda route: route.continue_(
            post_data={**route.request.post_data_json, "temperature": -1}
        ),
        times=1,
    )
    refusing.send("What is a cup?")
    page.wait_for_selector(".trouble:visible")
    assert page.inner_text(".trouble-title") == "The server refused this question"
    assert "temperature is -1" in page.inner_text(".trouble-text")
    assert page.inner_text("#announcer").startswith("The server refused this question. ")
    page.get_by_role("button", name="Edit the question").click()
    assert page.input_value("#question") == "What is a cup?"


def test_a_full_context_offers_a_new_chat(refusing: Chatting) -> None:
    page = refusing.page
    refusing.send("word " * 3000)
    page.wait_for_selector(".trouble:visible")
    assert page.inner_text(".trouble-title") == "This chat is longer than the model can read"
    assert "context is 1024 tokens" in page.inner_text(".trouble-text")
    page.locator(".trouble").get_by_role("button", name="New chat").click()
    assert page.is_visible("#welcome")


def test_a_lost_network_is_said_and_tried_again(refusing: Chatting) -> None:
    page = refusing.page
    refusing.context.set_offline(True)
    refusing.send("What is a cup?")
    page.wait_for_selector(".trouble:visible")
    assert page.inner_text(".trouble-title") == "No connection to the server"
    refusing.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    assert refusing.finished() != ""


PIECE = 'data: {"choices": [{"index": 0, "delta": {"content": "A cup"}}]}\n\n'
FAULT = 'data: {"error": {"message": "The server failed.", "code": "internal_error"}}\n\n'


@pytest.mark.parametrize(
    ("events", "title"),
    [
        (PIECE, "No connection to the server"),
        (f": ping\n\n{PIECE}{FAULT}", "Something went wrong"),
    ],
    ids=["breaks", "fails"],
)
def test_a_stream_that_does_not_end_well_keeps_what_came(
    refusing: Chatting, events: str, title: str
) -> None:
    page = refusing.page

    def answer(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=events)

    page.route(QUESTIONS, answer)
    refusing.send("What is this?")
    page.wait_for_selector(".trouble:visible")
    assert page.inner_text(".answer-text") == "A cup"
    assert page.inner_text(".trouble-title") == title


def test_a_key_is_asked_for_used_and_kept_as_chosen(server: Server, browser: Browser) -> None:
    chat = Chatting(browser, server.address, key="")
    chat.refusals = True
    chat.open()
    page = chat.page
    page.wait_for_selector("#server-state:has-text('Key needed')")
    chat.send("What is a cup?")
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key-value", KEY)
    page.press("#key-value", "Enter")
    page.wait_for_selector(".turn.writing")
    page.click("#stop")
    chat.finished()
    assert page.evaluate(
        "[sessionStorage.getItem('minigpt4.key'), localStorage.getItem('minigpt4.key')]"
    ) == [KEY, None]
    page.click("#open-key")
    page.check("#key-keep")
    page.get_by_role("button", name="Use this key").click()
    assert page.evaluate(
        "[sessionStorage.getItem('minigpt4.key'), localStorage.getItem('minigpt4.key')]"
    ) == [None, KEY]
    page.click("#open-key")
    page.get_by_role("button", name="Forget it").click()
    assert page.evaluate("sessionStorage.length") == 0
    assert page.evaluate("localStorage.getItem('minigpt4.key')") is None
    chat.close()


def test_a_wrong_key_is_asked_for_again(server: Server, browser: Browser) -> None:
    chat = Chatting(browser, server.address, key="no key of this server")
    chat.refusals = True
    chat.open()
    chat.send("What is a cup?")
    chat.page.wait_for_selector("#key-dialog[open]")
    chat.page.keyboard.press("Escape")
    assert chat.page.inner_text(".trouble-title") == "The server asks for an API key"
    chat.page.get_by_role("button", name="Enter a key").click()
    assert chat.page.is_visible("#key-dialog")
    chat.close()


def test_the_key_is_no_part_of_the_address_or_the_code(chat: Chatting) -> None:
    chat.set(max_tokens=2)
    chat.ask("What is a cup?")
    chat.page.click("#open-code")
    for language in ("curl", "Python"):
        chat.page.get_by_role("radio", name=language).check()
        assert KEY not in chat.page.inner_text("#code-text")
    assert KEY not in chat.page.url
    request = urllib.request.Request(f"{chat.address}/v1/models")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=10)
