"""Secure sums: the server learns the sum of the sites' vectors, and no site's own.

**Protocol.** Double masking (Bonawitz et al. 2017, *Practical Secure Aggregation for Privacy-Preserving
Machine Learning*, the variant against an active server). A round has five exchanges, which the server
relays:

============  =========================================================  =====================================
exchange      a site receives                                            a site sends
============  =========================================================  =====================================
``keys``      the round                                                  two fresh X25519 keys, signed
``shares``    everybody's keys (the roster)                              shares of its two secrets, sealed for
                                                                         each other site
``work``      the task, and the shares that are sealed for it            its vector, masked
``agree``     the names of the sites whose vectors arrived               its signature on them
``unmask``    signatures of at least t sites on the same names           of each site one share
============  =========================================================  =====================================

A vector is masked twice: by a mask of the site's own, and by one for each other site, which that one
subtracts. In the sum the second kind cancels. Of a site whose vector arrived, the others reveal shares of its
own mask; of one that was lost after ``shares``, shares of the key that its pairwise masks come from. A site
never reveals both of the same site. The graph of pairs is complete, so that a round has at most
:data:`~.terms.MOST_SITES` sites.

**What is promised.** A server that follows the protocol, and one that does not, learn nothing but the sum of
at least t of n vectors, as long as at most ``colluding`` sites help it:

- t is ⌊2n/3⌋+1 or more (:meth:`~.terms.Terms.needed`), so that two lists of survivors cannot both gather
  t signatures.
- Keys are signed, by :class:`~.identity.Signer`: a server cannot bring sites of its own.
- All masks and signatures depend on the SHA-256 of the task that the site received. Of sites that were given
  different models no masks cancel, and no signatures agree (Pasquini et al. 2021, arXiv 2111.07380).
- A site unmasks once a round. What it unmasks is noted first (:data:`~.site.Note`), so that a round which is
  repeated with other survivors is refused, and the difference of two sums is nobody's vector.

**What is not.** The sum itself says something about everybody in it. Two runs of one recipe, one with a site
and one without it, give that site's vector by subtraction. A site can send any vector: nothing checks it.

**Modules.** :mod:`.fixed_point` turns numbers into integers, :mod:`.masks` and :mod:`.shares` are the
primitives, :mod:`.identity` signs, :mod:`.messages` is what travels. :mod:`.site` and :mod:`.server` are the
two state machines: messages in, messages out. Nothing here reads a file, a clock or a socket.
"""
