"""A server of one finished run, with OpenAI's interface: chats, texts, classes and answers from documents."""
