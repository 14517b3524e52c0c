"""Text to tokens: files of any form, chats, tokenizers, corpora and how the published ones are made."""
