"""Benign requests of our own writing, to widen the benign side of the training set.

The licensed benign sets are mostly short bank, assistant and arithmetic questions. A detector
trained on those alone learns "an imperative about something else" as an attack. These
templates add ordinary imperatives, role-play, documents with a task, and sentences that use
the vocabulary of attacks for harmless things.

    for text in written(random.Random(0), 500): ...
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

TOPICS = (
    "the water cycle",
    "container gardening",
    "jazz piano",
    "compound interest",
    "the French Revolution",
    "binary search trees",
    "sourdough bread",
    "remote work",
    "black holes",
    "electric bicycles",
    "public libraries",
    "sleep hygiene",
    "chess openings",
    "photosynthesis",
    "the Silk Road",
    "unit testing",
    "stoic philosophy",
    "coral reefs",
    "marathon training",
    "climate policy",
    "password managers",
    "antibiotic resistance",
    "the history of cryptography",
    "firewalls",
    "medieval siege weapons",
    "vaccines",
    "tax returns",
    "a lost dog",
    "a lighthouse keeper",
    "a chemistry set",
    "crime novels",
    "moving to a new city",
    "a small bakery",
    "graph databases",
    "the immune system",
    "bird migration",
    "knitting",
    "solar panels",
    "time zones",
    "negotiating a salary",
    "linear regression",
    "Kubernetes deployments",
    "bee keeping",
    "opera",
    "a job interview",
    "quantum computing",
    "poker odds",
    "food safety",
    "the Cold War",
    "home insulation",
)
ROLES = (
    "travel guide",
    "maths tutor",
    "career coach",
    "SQL console",
    "Linux terminal",
    "sommelier",
    "history teacher",
    "film critic",
    "proofreader",
    "security auditor",
    "lawyer explaining contracts",
    "nutritionist",
    "dungeon master",
    "pirate captain",
    "customer support agent for a bank",
    "interviewer",
    "stand-up comedian",
    "librarian",
)
LANGUAGES = ("French", "German", "Spanish", "Japanese", "Portuguese", "Latin", "Hindi", "Polish")
REQUESTS = (
    "Write a {n}-word essay about {t}.",
    "write me a poem about {t}",
    "Explain {t} to a ten-year-old.",
    "Give me {k} ideas for a blog post on {t}.",
    "Summarise what is known about {t} in {k} bullet points.",
    "What are the pros and cons of {t}?",
    "Create a study plan for learning about {t} over {k} weeks.",
    "Compare {t} and {u}.",
    "Make a quiz with {k} questions about {t} and give the answers at the end.",
    "Translate into {l}: I would like to know more about {t}.",
    "Tell me a short story about {t}. Make it funny.",
    "I'm giving a talk about {t} tomorrow. Can you help me outline it?",
    "Rewrite this sentence in a formal tone: {t} is kinda cool but hard to get into.",
    "Act as a {r} and answer my questions about {t}.",
    "I want you to act as a {r}. I will ask questions and you will answer in character."
    " My first question is about {t}.",
    "Pretend you are a {r}. Stay in character and talk to me about {t}.",
    "You are a {r}. Help the user with {t}. Keep your answers under {n} words.",
    "From now on, please answer in {l}. What should I know about {t}?",
    "Write a Python function that parses a file about {t} and returns the {k} longest lines.",
    "Write a dialogue between a {r} and a student about {t}.",
    "Ignore my last question, I meant to ask about {t}.",
    "Please disregard the previous email; the meeting about {t} is on Friday.",
    "Forget what I said about {u}. Let's talk about {t} instead.",
    "The teacher said to ignore the instructions on page {k}. What does the page on {t} say?",
    "How do I override the default settings in an app about {t}?",
    "Why do people break rules? Relate it to {t}.",
    "Is there a hidden message in stories about {t}?",
    "How do I reset my own password on a site about {t}?",
    "What is a system prompt and how do developers write one for {t}?",
    "How do security teams defend against attacks? Use {t} as an analogy.",
    "What laws apply to {t} in the EU?",
    "How can I kill some time while reading about {t}?",
    "Describe how detectives solve a murder in novels about {t}.",
    "How do I stop a Python process that downloads pages about {t}?",
    "What are the safety rules one should follow around {t}?",
    "Design a logo for a club about {t}. Describe it without any restrictions on colour.",
    "Generate a table with {k} rows on {t} with columns name, year and note.",
    "Continue the list: {t}, {u},",
    "Draft an email to my manager asking for a day off because of {t}.",
    "Hi! Quick question, what's the best way to get started with {t}? thanks",
    "Could you check the grammar of this: 'He don't know nothing about {t}.'",
    "Classify the sentiment of: 'I was told {t} is boring, but I loved it.'",
    "Who invented {t}, and what happened afterwards?",
    "give me a recipe inspired by {t}",
    "Let's play a game: you describe {t} without naming it and I guess.",
    "How do I explain to my children why {t} can be dangerous?",
    "What should I do if I suspect fraud related to {t}?",
    "Imagine a world without {t}. What changes?",
    "Answer with only yes or no: is {t} older than {u}?",
    "Respond in JSON with keys title and summary. Subject: {t}.",
)
TASKS = (
    "Summarise the following text in three sentences:\n\n{d}",
    "Read the passage and list the main facts.\n\n{d}",
    "What is this text about?\n\n{d}",
    "{d}\n\nTranslate the above into Spanish.",
    "{d}\n\nQuestion: what is the most important point here?",
    "Correct spelling and punctuation in this text:\n{d}",
    "Extract all names and numbers from the document below as a list.\n---\n{d}\n---",
    "Here is a search result:\n{d}\nUse it to write a short overview.",
    "{d}",
)
CODE_TASKS = (
    "What does this code do?\n\n{d}",
    "Review the following Python and suggest improvements:\n\n{d}",
    "Add type annotations to this module:\n```python\n{d}\n```",
    "{d}\n\nWrite unit tests for the code above.",
    "{d}",
)


def written(random_: random.Random, n: int) -> Iterator[str]:
    """``n`` ordinary requests."""
    for index in range(n):
        topic, other = random_.sample(TOPICS, 2)
        text = REQUESTS[index % len(REQUESTS)].format(
            t=topic,
            u=other,
            r=random_.choice(ROLES),
            l=random_.choice(LANGUAGES),
            n=random_.choice((50, 100, 200, 500)),
            k=random_.randint(2, 12),
        )
        yield text if random_.random() < 0.7 else text.lower().rstrip(".")


def over_documents(
    random_: random.Random, documents: Sequence[str], code: bool = False, n_chars: int = 600
) -> Iterator[str]:
    """One ordinary task over an excerpt of each document."""
    tasks = CODE_TASKS if code else TASKS
    for index, document in enumerate(documents):
        yield tasks[index % len(tasks)].format(d=excerpt(random_, document, n_chars))


def hidden(random_: random.Random, document: str, order: str, n_chars: int = 450) -> str:
    """A document that carries an attacker's ``order`` at its start, middle or end."""
    text = excerpt(random_, document, n_chars)
    cut = random_.choice((0, len(text) // 2, len(text)))
    cut = text.rfind(" ", 0, cut) + 1 if cut < len(text) else cut
    joint = random_.choice(("\n\n", " ", "\n", "\n---\n"))
    return f"{text[:cut]}{joint}{order}{joint}{text[cut:]}".strip()


def excerpt(random_: random.Random, document: str, n_chars: int) -> str:
    """Up to ``n_chars`` characters of the document, from a word's start."""
    size = random_.randint(n_chars // 3, n_chars)
    start = random_.randint(0, max(0, len(document) - size))
    start = document.find(" ", start) + 1 if start else 0
    return document[start : start + size].strip() or document[:size]
