"""The core of the cache: it decides and accounts, and never copies a byte.

No torch, no sglang, no clock, no thread, no randomness: the core is a deterministic function of
the calls made, so all ranks that get the same calls hold the same table.

Who owns what
-------------
``cache.PrefixCache`` builds these objects and passes calls on. Each has its state for itself; the
others call its methods. A flush replaces all of them but those that say so.

================================  ================================================================
``table.table.PageTable``         rows, digests, ages, four columns of slots (``SlotColumn``); its
                                  loops are in ``compiled``
``table.changes.Changes``         rows whose copies have changed, for KV events; only with them
``residency.Residency``           where pages are: every change of slots goes through it
``host.kept.KeptWindows``         the windows that the host keeps
``host.quotas.Quotas``              what namespaces may have of the host; outlives a flush
``host.own_room.OwnRoom``           keeps them to it: what gives way to a namespace of its own
``host.space.HostSpace``          host slots of one component; ``host.arena.Arena`` has the extents
``host.room.HostRoom``            what gives way on the host
``host.sampling.Sampling``        whether the host is read, or only a sample is copied
``device.look_ahead.LookAhead``   when to look at what eviction takes next
``candidates.Candidates``            what may be evicted, dropped or copied next, in order
``device.eviction.DeviceEviction``  frees device pages, in the order of ``candidates``
``moves.backups.Backups``         device to host
``moves.loads.Loads``             host to device
``inserts.Inserts``               what requests have computed goes to the table
``sessions.Sessions``               which pages open sessions have used
``control.pins.Pins``               prefixes that stay on the host
``control.drops.Drops``             prefixes and namespaces that are forgotten on demand
``storage.persists.Persists``     host to storage
``storage.prefetches.Prefetches``   storage to host
``moves.log.TransferLog``         numbers of transfers, and those in flight; numbers outlive a flush
``storage.attachment.Attachment``   whether there is storage; outlives a flush
================================  ================================================================

``retention.expiry.Expiry``, one for all tables, tells a table with the learned policy when pages
expire, what the host goes by, and what is worth a copy there. It asks a
``retention.retention.Retention``, which owns the history (``Returns``), the table of what pages are
worth (``Estimate``), and a ``Duel`` of the learned rule with least recently used.
``retention.order.Order`` is for that duel alone.

``moves.ledger.Ledger`` and ``storage.ledger.StorageLedger`` belong to the adapter's controller and
storage tier. They turn what one rank has seen into a report, and the minimum of all reports into
commits.

Data flow
---------
A match reads. ``begin`` reserves slots and holds rows. The transfer engine or the storage does the
I/O, outside. ``commit`` publishes, in the order of operations, on all ranks in the same step::

    insert --> device --backup--> host --persist--> storage
               device <--load---- host <-prefetch-- storage

One scheduler step
------------------
The engine calls ``adapter.prefix_cache.SwaHiCache``, in this order:

1. ``check_hicache_events``, first and on every rank: ``HostTierController.commit_finished`` takes
   one minimum over ranks, then ``Ledger.commit`` ends backups and loads (``Backups.commit``,
   ``Loads.commit``). ``StorageTier.commit`` ends and publishes what storage has done and begins
   persists (``Persists.begin``). ``queue_demotions`` begins backups ahead of eviction
   (``Backups.demote_ahead``, which asks ``LookAhead.next``); ``submit_backups`` submits them. What
   is beyond quotas goes before (``OwnRoom.step``).
2. ``checkpoint`` of the request whose prompt is computed in chunks: see 5.
3. For each waiting request: ``check_prefetch_progress``; ``match_prefix`` (``match_and_use``);
   ``init_load_back`` (``Loads.begin``) if the match needs a load; ``inc_lock_ref`` (``hold``).
   ``ready_to_load_host_cache`` submits all loads as one job.
4. ``evict`` (``DeviceEviction.evict``) when an allocation for the batch is short. The forward pass
   runs; each layer waits for its part of the loads.
5. ``checkpoint`` of requests whose prompt or answer has ended: ``Inserts.insert`` takes their
   pages over, the lock moves to the new path, and ``Backups.begin_for_request`` begins what the
   write policy says.
6. ``flush_pending_backups`` submits these backups as one job.
7. ``take_events``, if there are KV events: what has changed since the last step.

``prefetch_from_storage`` (``Prefetches.look_up``) comes when a request gets in line.
"""
