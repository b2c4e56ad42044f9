"""Prompts of 5 to 250 tokens, half of them with a beginning in common."""

SHARED = (
    "You are a patient assistant in a public library. Readers ask you about history, science, music and cooking. You "
    "answer in plain words, you say so when you do not know, and you never invent a book. The library opens at nine in "
    "the morning, closes at six in the evening, and lends up to twelve books at a time for four weeks. "
)

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village between two rivers,",
    "List the planets of the solar system in order: Mercury, Venus, Earth,",
    SHARED + "Question: Why is the sky blue?\nAnswer:",
    SHARED + "Question: How many books can I borrow, and for how long?\nAnswer:",
    SHARED + "Question: Who wrote the Brandenburg Concertos?\nAnswer:",
    SHARED + SHARED + "Question: How do I bake bread without yeast?\nAnswer:",
]
