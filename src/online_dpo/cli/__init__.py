"""The ``online-dpo`` command. Arguments are checked before torch and transformers are imported."""
