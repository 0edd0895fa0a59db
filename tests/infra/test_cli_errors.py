"""What went wrong, as people read it."""

from aiokafka.errors import KafkaConnectionError

from infra.cli.output import print_table
from streams.errors import explain


def test_an_error_is_named_once() -> None:
    assert explain(TimeoutError()) == "TimeoutError"
    assert explain(ValueError("no such thing\nand more")) == "ValueError: no such thing"
    assert explain(KafkaConnectionError("refused")) == "KafkaConnectionError: refused"


def test_a_column_of_words_with_a_few_numbers_is_set_as_words(capsys) -> None:
    print_table(("setting", "n"), [("a", "text"), ("b", 4), ("c", "more"), ("d", None)])
    print_table(("topic", "n"), [("frames", "~70000"), ("cameras", 3), ("batches", 12)])
    words, counts = capsys.readouterr().out.split("topic")
    assert "  b         4" in words
    assert "  frames    ~70000" in counts
    assert "  cameras        3" in counts
