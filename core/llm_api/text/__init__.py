"""Texts, chats and streams from the same engines; scoring needs none of it."""
