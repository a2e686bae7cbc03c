"""shim"""

from minisa.text.chat_format import find_dialog
from minisa.text.dialog import DIALOGS, Message  # noqa: F401


class ChatTemplate:
    def __init__(self, d, tok):
        self.d = d
        self.tok = tok
        self.name = d.name

    def ids(self, messages):
        return self.d.render(messages, self.tok)

    @property
    def stop_ids(self):
        return self.d.stop_ids(self.tok)


def find_template(path, tokenizer, chat_format=None, known=None):
    known = chat_format or (known if tokenizer.chat_template is None else None)
    return ChatTemplate(DIALOGS[known] if known else find_dialog(path, tokenizer), tokenizer)
