"""Load testing: the same frozen work under different settings, against a live server or in virtual time."""
