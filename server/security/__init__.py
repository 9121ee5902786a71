"""Who may call: TLS, tokens, roles."""
