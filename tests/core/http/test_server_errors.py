"""What an error's body says, in one short line."""

from __future__ import annotations

import pytest

from core.errors import RequestRejected
from core.llm_api.http.server_errors import MESSAGE_LIMIT, server_message, status_error

PAGE = """
<!DOCTYPE html>
<html lang="en"><head><style>body { margin: 0 }</style><title>404
 Not Found</title></head><body><h1>Page not found</h1><p>The page that you are looking for.</p></body></html>
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (PAGE, "404 Not Found"),
        ("<html><body><h1>Bad <b>Gateway</b></h1></body></html>", "Bad Gateway"),
        ("<html><body>nothing</body></html>", "a page of HTML"),
        ("<3 tokens", "<3 tokens"),
        ('{"error": {"message": "<html> is no prompt"}}', "<html> is no prompt"),
        ("", ""),
        ("x" * 400, "x" * MESSAGE_LIMIT + "..."),
    ],
)
def test_a_page_of_html_is_its_title(body: str, said: str) -> None:
    assert server_message(body.encode()) == said


def test_a_404_is_one_line_that_says_what_to_check() -> None:
    error = status_error(404, server_message(PAGE.encode()), {}, "http://a/v1", key_name="API_KEY", has_key=False)
    assert isinstance(error, RequestRejected)
    assert str(error).startswith("HTTP 404 from http://a/v1: 404 Not Found. Check the URL")
