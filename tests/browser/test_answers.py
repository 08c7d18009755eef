"""Answers come word by word, stop, are written again, and are asked for as the settings say."""

from __future__ import annotations

from tests.browser.chatting import COFFEE, LONG, Chatting
from tests.browser.conftest import Server

RECORD = """
window.seen = [];
window.said = [];
new MutationObserver(() => {
  const turn = document.querySelector(".turn:last-child");
  const text = turn?.querySelector(".answer-text").textContent ?? "";
  if (text) seen.push([text.length, turn.classList.contains("writing")]);
}).observe(document.querySelector("#turns"), { childList: true, subtree: true, characterData: true });
new MutationObserver(() => {
  const text = document.querySelector("#announcer").textContent;
  if (text) said.push(text);
}).observe(document.querySelector("#announcer"), { childList: true });
"""


def test_an_answer_grows_word_by_word_and_is_announced_once_when_it_is_whole(
    chat: Chatting,
) -> None:
    chat.page.evaluate(RECORD)
    chat.set(max_tokens=12)
    answer = chat.ask(LONG)
    chat.until("said.length > 0")
    lengths = [length for length, writing in chat.page.evaluate("seen") if writing]
    assert len(set(lengths)) > 4
    assert lengths == sorted(lengths)
    assert chat.page.evaluate("said") == [f"Answer: {answer}"]


def test_an_answer_tells_its_speed_its_length_and_the_context_it_takes(chat: Chatting) -> None:
    chat.set(max_tokens=6)
    chat.ask(LONG)
    stats = chat.turns.locator(".stats").inner_text()
    assert "first token " in stats
    assert " tokens/s · 6 tokens · cut at its longest" in stats
    assert " of 1,024 tokens" in chat.page.inner_text("#context-use")
    assert chat.bodies[0]["stream"] is True
    assert chat.bodies[0]["stream_options"] == {"include_usage": True}


def test_stop_ends_an_answer_and_frees_its_slot(chat: Chatting, server: Server) -> None:
    server.wait_for("num_requests_running", 0)
    aborted = server.metric("request_success_total", 'finished_reason="abort"')
    chat.set(max_tokens=800)
    chat.send(LONG)
    chat.page.wait_for_selector(".turn.writing")
    server.wait_for("num_requests_running", 1)
    chat.page.click("#stop")
    text = chat.finished()
    assert chat.turns.locator(".remark").inner_text() == "Stopped."
    server.wait_for("num_requests_running", 0)
    server.wait_for("request_success_total", aborted + 1, labels='finished_reason="abort"')
    assert len(text) > 0
    assert chat.turns.locator(".answer-text").inner_text() == text
    assert "about " in chat.turns.locator(".stats").inner_text()


def test_writing_again_asks_the_same_and_says_why_the_answer_is_the_same(chat: Chatting) -> None:
    chat.set(max_tokens=4)
    first = chat.ask("What is a cup?")
    chat.page.get_by_role("button", name="Write this answer again").click()
    chat.page.wait_for_selector(".remark:visible")
    assert chat.finished() == first
    assert chat.turns.locator(".remark").inner_text().startswith("The same answer again.")
    assert chat.bodies[0] == chat.bodies[1]
    assert chat.turns.count() == 1


def test_an_edited_question_keeps_its_picture_and_replaces_what_came_after(chat: Chatting) -> None:
    chat.choose(COFFEE)
    chat.answers()
    chat.ask("What is this?")
    chat.ask("What can I do with it?")
    chat.turns.first.hover()
    chat.turns.first.get_by_role("button", name="Edit this question").click()
    assert "and the question after it" in chat.page.inner_text("#editing")
    assert chat.page.input_value("#question") == "What is this?"
    assert chat.thumbs.count() == 1
    chat.send("Describe this picture.")
    chat.until("document.querySelectorAll('.turn').length === 1")
    chat.finished()
    content = chat.bodies[-1]["messages"][0]["content"]
    assert len(chat.bodies[-1]["messages"]) == 1
    assert [part["type"] for part in content] == ["image_url", "text"]
    assert content[1]["text"] == "Describe this picture."
    assert chat.page.is_hidden("#editing")


def test_a_cancelled_edit_gives_back_what_was_being_written(chat: Chatting) -> None:
    chat.answers()
    chat.ask("What is a cup?")
    chat.page.fill("#question", "a draft")
    chat.turns.first.hover()
    chat.page.get_by_role("button", name="Edit this question").click()
    chat.page.keyboard.press("Escape")
    assert chat.page.input_value("#question") == "a draft"
    assert chat.turns.count() == 1


def test_earlier_turns_are_told_and_those_without_an_answer_are_not(chat: Chatting) -> None:
    chat.answers()
    answer = chat.ask("What is a cup?")
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.refusals = True
    chat.send("This one fails.")
    chat.page.wait_for_selector(".trouble:visible")
    chat.page.unroute("**/v1/chat/completions")
    chat.ask("And a saucer?")
    assert chat.bodies[-1]["messages"] == [
        {"role": "user", "content": "What is a cup?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And a saucer?"},
    ]
    assert "not told of this question" in chat.turns.nth(1).inner_text()


def test_settings_that_were_changed_are_sent_and_no_others(chat: Chatting) -> None:
    chat.set(temperature=0.7, seed=7, max_tokens=5, top_p=0.9)
    first = chat.ask("What is a cup?")
    own = {"temperature": 0.7, "seed": 7, "max_tokens": 5, "top_p": 0.9}
    always = {"model", "messages", "stream", "stream_options"}
    assert {name: chat.bodies[0][name] for name in chat.bodies[0].keys() - always} == own
    assert "Seed 7" in chat.page.inner_text("#changed-settings")
    chat.page.get_by_role("button", name="Write this answer again").click()
    assert chat.finished() == first, "the same seed"
    chat.page.click("#open-settings")
    chat.page.get_by_role("button", name="Back to the defaults").click()
    chat.page.keyboard.press("Escape")
    assert chat.page.is_hidden("#changed-settings")
    assert chat.page.evaluate("localStorage.getItem('minigpt4.settings')") == "{}"


def test_a_setting_out_of_its_range_is_said_and_not_sent(chat: Chatting) -> None:
    chat.page.click("#open-settings")
    chat.page.fill("#set-top_p", "3")
    assert "A number from 0.01 to 1, or empty." in chat.page.inner_text("#error-top_p")
    chat.page.fill("#set-num_beams", "3")
    chat.page.fill("#set-temperature", "1")
    assert "set the temperature to 0" in chat.page.inner_text("#settings-conflict")
    assert (
        chat.page.evaluate("localStorage.getItem('minigpt4.settings')")
        == '{"temperature":1,"num_beams":3}'
    )


def test_beams_come_whole_and_draw_nothing(chat: Chatting) -> None:
    chat.set(num_beams=2, max_tokens=4)
    assert chat.ask("What is a cup?")
    body = chat.bodies[0]
    assert (body["num_beams"], body["temperature"], "stream" in body) == (2, 0, False)
    assert " tokens/s" in chat.turns.locator(".stats").inner_text()


def test_copy_puts_the_answer_on_the_clipboard(chat: Chatting) -> None:
    chat.answers()
    answer = chat.ask("What is a cup?")
    chat.page.get_by_role("button", name="Copy this answer").click()
    chat.page.wait_for_selector(".copy-answer use[href$=check]", state="attached")
    assert chat.page.evaluate("navigator.clipboard.readText()") == answer
